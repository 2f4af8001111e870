"""The families of `flash`: their declarations, the gate that judges them, and the tables that are shipped for them."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from longspan.autotune import Case, Family, folders, forget, overridden, override, table, untuned
from longspan.autotune.device import Device, illegal, minor, triton_version
from longspan.autotune.digest import digest
from longspan.autotune.family import canonical, families, imported
from longspan.autotune.pool import Pool, every
from longspan.backends import flash
from longspan.backends.flash import choices, decode_choices, merge_choices, rope_choices
from longspan.backends.flash.choices import Key, choose, heuristic
from longspan.backends.flash.fitting import fitting
from longspan.cli import tune_gate
from longspan.cli.tune import SOURCES, launched, pick
from longspan.laws.mutants import MUTANTS
from longspan.spec import AttentionState

pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = families(SOURCES)
ARCHS = ("sm_80", "sm_90", "sm_120", "gfx942")
HERE = Path(__file__).parent
SMALL_KEY = Key(kernel="forward", architecture="sm_90", width=64, itemsize=2, masked=True, descriptors=True)
SMALL: dict[str, tuple[Case, dict[str, Any]]] = {
    "flash.forward": (
        Case(
            key={"width": 16, "itemsize": 2, "masked": True, "descriptors": True},
            problem={"b": 1, "h": 1, "m": 70, "d": 16, "causal": True}, variant={},
        ),
        {"tile_m": 64, "tile_n": 128, "num_warps": 4, "num_stages": 1, "descriptors": True},
    ),
    "flash.backward_keys": (
        Case(
            key={"width": 16, "itemsize": 2, "masked": False, "descriptors": True},
            problem={"b": 1, "h": 1, "m": 70, "d": 16, "causal": False}, variant={},
        ),
        {"tile_m": 128, "tile_n": 64, "num_warps": 4, "num_stages": 1, "descriptors": False},
    ),
    "flash.rotate": (
        Case(
            key={"tokens": 5, "heads": 2, "planes": 8, "itemsize": 2, "inside": True},
            problem={"b": 1, "h": 2, "g": 1, "m": 40, "d": 16, "inside": True}, variant={},
        ),
        {"tokens": 16, "heads": 2, "split": 1, "num_warps": 1},
    ),
    "flash.merge": (
        Case(
            key={"parts": 4, "columns": 16, "itemsize": 4},
            problem={"b": 1, "h": 2, "m": 32, "e": 16, "parts": 3, "dtype": "float32"}, variant={},
        ),
        {"rows": 16, "num_warps": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_familys_spaces_are_plain_data_of_bearable_size(family: Family, arch: str) -> None:
    cases = family.cases(arch)
    assert len({case.name for case in cases}) == len(cases)
    assert cases or (family.name.startswith("hopper.") and arch != "sm_90")
    for case in cases:
        choices = [canonical(choice) for choice in family.space(case, arch)]
        assert len(set(choices)) == len(choices) <= 45
        start = family.heuristic(case, arch)
        assert all(set(json.loads(choice)) == set(start) for choice in choices)
        costs = [family.cost(case, json.loads(choice), arch) for choice in choices]
        assert all(cost >= 0 for cost in costs)
        assert family.cost(case, start, arch) == 0  # what serves comes first, and its neighbours next


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("whole", [False, True])
def test_kernels_pass_the_gate_under_a_choice_that_is_not_the_heuristics(name: str, whole: bool) -> None:
    case, choice = SMALL[name]
    with override({name: choice}):
        assert 0 < tune_gate.gate(FAMILIES[name], case, DEVICE, whole=whole) <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_relatives_are_problems_that_the_gate_can_pose(name: str) -> None:
    family = replace(FAMILIES[name], backend="longspan.backends.eager")
    few = name in {"flash.few", "flash.paged"}
    small = {"h": 2, "g": 1, "m": 3 if few else 64, "d": 16, "n": 200, "e": 16}
    for case in {one.variant.get("mask", ""): one for one in family.cases("sm_90")}.values():
        related = family.relatives(case, "sm_90")
        assert related
        for one in (case, *related):
            assert one.key == case.key
            problem = {x: small.get(x, value) for x, value in one.problem.items()}
            tried = Case(key=one.key, problem=problem, variant=one.variant)
            assert 0 < tune_gate.gate(family, tried, "cpu", whole=False) <= 1
        assert (
            0
            < tune_gate.gate(
                family,
                Case(key=case.key, problem={x: small.get(x, value) for x, value in case.problem.items()}, variant={}),
                "cpu",
                whole=True,
            )
            <= 1
        )


@pytest.mark.parametrize("name", SMALL)
def test_a_prepared_launch_returns_what_it_wrote(name: str) -> None:
    case, choice = SMALL[name]
    with override({name: choice}):
        call = FAMILIES[name].prepare(case, DEVICE, True)  # filled in
        first, second = call(), call()
    for x, y in zip(*((one if isinstance(one, list | tuple) else [one]) for one in (first, second)), strict=True):
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "mutant", ["causal_from_the_top_left", "tail_tile_dropped", "rescale_forgotten", "rows_past_192_zero"]
)
def test_the_gate_rejects_planted_bugs(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    backend: Any = next(one.backend for one in MUTANTS if one.name == mutant)
    monkeypatch.setitem(sys.modules, "a_mutant", backend)
    broken = replace(FAMILIES["flash.forward"], backend="a_mutant")
    with pytest.raises(AssertionError, match="exceeds budget"):
        tune_gate.gate(broken, SMALL["flash.forward"][0], DEVICE, whole=False)


def test_the_gate_hands_out_memory_full_of_nan() -> None:
    with tune_gate.poisoned():
        fresh = [torch.empty(9), torch.zeros(3).new_empty(5), torch.empty_like(torch.zeros(2, dtype=torch.bfloat16))]
    assert all(x.isnan().all() for x in fresh)
    assert not torch.are_deterministic_algorithms_enabled()


def unwritten(q: torch.Tensor, _: torch.Tensor, v: torch.Tensor, **options: Any) -> AttentionState:
    """Return results that nobody wrote."""
    del options
    return AttentionState(q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32))


def test_results_that_nobody_wrote_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy: Any = SimpleNamespace(attention=unwritten)
    monkeypatch.setitem(sys.modules, "a_mutant", lazy)
    broken = replace(FAMILIES["flash.forward"], backend="a_mutant")
    with pytest.raises(AssertionError, match="exceeds budget"):
        tune_gate.gate(broken, SMALL["flash.forward"][0], DEVICE, whole=False)


def test_a_tuned_choice_that_does_not_fit_gives_way_to_the_heuristic(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    asked: list[bool] = []

    def launch(x: int) -> int:
        asked.append(overridden())
        if not overridden() or x < 0:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return x

    fitted = fitting(launch)
    assert [fitted(1), fitted(2)] == [1, 2]
    assert asked == [False, True, False, True]
    (record,) = caplog.records
    assert "does not fit this problem" in record.getMessage()
    with override({"flash.forward": {}}), pytest.raises(OutOfResources):
        fitted(-1)  # a choice that was forced, and is measured, must not be answered by another
    key = Key(kernel="forward", architecture="sm_90", width=64, itemsize=2, masked=True, descriptors=True)
    with untuned():
        assert choose(key) == heuristic(key)


def test_an_operation_that_the_gate_does_not_know_is_an_error() -> None:
    odd = replace(FAMILIES["flash.forward"], operation="prayer")
    with pytest.raises(ValueError, match=r"not 'prayer' of flash\.forward"):
        tune_gate.gate(odd, SMALL["flash.forward"][0], DEVICE, whole=False)


@pytest.mark.skipif(not (HERE.parent / "examples").is_dir(), reason="needs the sources")
def test_a_models_layers_say_what_is_tuned() -> None:
    config = HERE.parent / "examples" / "configs" / "llama-3.1-8b.json"
    found = launched(config, 131072, pick(FAMILIES, ["flash"]), "sm_90")
    assert {name: len(cases) for name, cases in found.items()} == {
        "flash.forward": 1, "flash.backward_keys": 1, "flash.backward_queries": 1, "flash.few": 1, "flash.paged": 1,
        "flash.rotate": 2, "flash.merge": 0,
    }  # fmt: skip
    (case,) = found["flash.forward"]
    assert case.key == {"width": 128, "itemsize": 2, "masked": True, "descriptors": True}
    assert (case.problem["h"], case.problem["g"]) == (32, 8)


@pytest.mark.parametrize(
    ("build", "key", "choice", "changed"),
    [
        (choices.build, SMALL_KEY, {"tile_m": 64, "tile_n": 64, "num_warps": 4, "num_stages": 2}, changed)
        for changed in ({"tile_m": 48}, {"tile_n": 0}, {"tile_m": "128"}, {"num_warps": True}, {"num_stages": -1})
    ]
    + [
        (decode_choices.build, None, {"tile_n": 64, "num_warps": 4, "num_stages": 2, "resident": 1}, changed)
        for changed in ({"tile_n": 48}, {"num_warps": 3}, {"resident": 0}, {"num_stages": "2"})
    ]
    + [
        (rope_choices.build, None, {"tokens": 16, "heads": 2, "split": 1, "num_warps": 1}, changed)
        for changed in ({"tokens": 12}, {"heads": 0}, {"split": 0}, {"num_warps": 1.0})
    ]
    + [
        (merge_choices.build, None, {"rows": 16, "num_warps": 4}, changed)
        for changed in ({"rows": 12}, {"num_warps": 0})
    ],
)
def test_numbers_that_triton_does_not_take_are_no_choice(
    build: Any, key: Any, choice: dict[str, Any], changed: dict[str, Any]
) -> None:
    (name,) = changed
    with pytest.raises(ValueError, match=f"{name} must be a"):
        build(key, {**choice, **changed})


# Tables that are shipped.

SHIPPED: list[tuple[Device, dict[str, Any]]] = [
    (table.device_of(found), row)
    for path in sorted(folders.SHIPPED.glob("*.json"))
    for found in [table.read(path)]
    for row in found["rows"]
]
NAMES = [f"{row['family']}-{canonical(row['key'])}" for _, row in SHIPPED]


@pytest.fixture(scope="module")
def recompiled() -> dict[tuple[str, str], Any]:
    """Every shipped row's choice, compiled for its architecture by workers that may die; each variant once."""
    found: dict[tuple[str, str], Any] = {}
    environment = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    for device in {owner for owner, _ in SHIPPED}:
        servant, target = (
            {"sources": list(SOURCES)},
            {"target": device.target, "multiprocessors": device.multiprocessors},
        )
        with Pool(
            "longspan.autotune.compiler:Compiler", servant, count=len(os.sched_getaffinity(0)), environment=environment
        ) as pool:
            for owner, row in SHIPPED:
                case = case_of(row, device.arch)
                tag = row["family"], canonical(case.variant) + canonical(row["choice"])
                if owner == device and tag not in found:
                    found[tag] = None
                    fields = {"key": dict(case.key), "problem": dict(case.problem), "variant": dict(case.variant)}
                    pool.submit(tag, "compile", 300, family=row["family"], case=fields, choice=row["choice"], **target)
            found.update({outcome.tag: outcome for outcome in every(pool)})
    return found


def case_of(row: dict[str, Any], arch: str) -> Case:
    """The case that a row was tuned on."""
    known = {case.name: case for case in FAMILIES[row["family"]].cases(arch)}
    case = known[canonical(row["key"])]
    assert dict(case.problem) == row["problem"], "a case has changed since it was tuned"
    return case


@pytest.mark.parametrize(("device", "row"), SHIPPED, ids=NAMES)
def test_a_shipped_choice_compiles_and_is_legal(
    recompiled: dict[tuple[str, str], Any], device: Any, row: dict[str, Any]
) -> None:
    case = case_of(row, device.arch)
    outcome = recompiled[row["family"], canonical(case.variant) + canonical(row["choice"])]
    assert outcome.status == "ok", outcome.message
    used = outcome.value["resources"]
    assert illegal(used, device) is None
    if minor(row["triton"]) == minor(triton_version()):
        assert used == row["resources"]


@pytest.mark.parametrize(("device", "row"), SHIPPED, ids=NAMES)
def test_a_shipped_choice_is_of_the_code_that_is_here_and_of_its_space(device: Any, row: dict[str, Any]) -> None:
    family = FAMILIES[row["family"]]
    assert row["digest"] == digest(map(imported, family.sources)), (
        "the kernel has changed: run `longspan tune --export`"
    )
    case = case_of(row, device.arch)
    legal = [canonical(choice) for choice in (*family.space(case, device.arch), family.heuristic(case, device.arch))]
    assert canonical(row["choice"]) in legal
    assert row["verified"] <= 1
    assert row["finalists"][0][0] == row["choice"]
