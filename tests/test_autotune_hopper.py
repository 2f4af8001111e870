"""The families of `hopper`: keys are those of launches, choices compile without the GPU, elsewhere there are none."""

from collections.abc import Callable
from typing import Any

import pytest

from longspan.autotune import Case, override
from longspan.autotune.device import illegal, offline
from longspan.autotune.family import canonical, families
from longspan.autotune.pool import Pool, every

hopper: Any = pytest.importorskip("longspan.backends.hopper.families", exc_type=ImportError)
choices: Any = pytest.importorskip("longspan.backends.hopper.choices", exc_type=ImportError)
backward_choices: Any = pytest.importorskip("longspan.backends.hopper.backward_choices", exc_type=ImportError)
SOURCE = "longspan.backends.hopper.families:FAMILIES"
FAMILIES = families([SOURCE])
CASES = [(name, case) for name, family in FAMILIES.items() for case in family.cases("sm_90")]


class Asked(Exception):  # noqa: N818 - a question, and no error
    """A launch has asked for a choice."""


def asked_by(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The key that a small launch of a case asks for."""

    def ask(key: Any) -> Any:
        raise Asked(key)

    module = choices if case.variant["kernel"] == "forward" else backward_choices
    monkeypatch.setattr(module, "TUNED", ask)
    small = {**case.problem, "m": 2 * hopper.STEP + (int(case.problem["m"]) % 2) * 3, "h": 2, "g": 2}
    launch: Callable[[], Any] = FAMILIES[f"hopper.{case.variant['kernel']}"].prepare(
        Case(key=case.key, problem=small, variant=case.variant), "cpu", False
    )  # fmt: skip
    with pytest.raises(Asked) as question:
        launch()
    return question.value.args[0]._asdict()


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case.name}" for name, case in CASES])
def test_a_case_and_its_relatives_ask_for_its_key(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    related = FAMILIES[name].relatives(case, "sm_90")
    assert related
    for one in (case, *related):
        assert asked_by(one, monkeypatch) == dict(case.key)


def test_a_choice_in_force_is_what_is_launched() -> None:
    key = choices.Key(64, 64, masked=True, rich=False)
    tiles = {"W": 2, "N": 64, "STAGES": 3, "REGISTERS": 240, "LOADER": 24, "HEADS": 4}
    with override({"hopper.forward": tiles}):
        assert choices.TUNED(key)._asdict() == tiles
    assert choices.TUNED(key) == choices.tiles_by_rule(key)
    with pytest.raises(ValueError, match="N must be a power of two"):
        choices.build(key, {**tiles, "N": 96})
    for changed in ({"N": 32}, {"STAGES": 1}, {"W": 4}):
        with pytest.raises(ValueError, match="tiles must have 64 keys and 2 stages"):
            choices.build(key, {**tiles, **changed})
    with pytest.raises(TypeError, match="LANES"):
        choices.build(key, {**tiles, "LANES": 1})
    backward_key = backward_choices.Key(64, 64, plain=True, even=False)
    with override({"hopper.backward": {**backward_choices.by_rule(backward_key)._asdict(), "stages": 3}}):
        assert backward_choices.TUNED(backward_key).stages == 3
    with pytest.raises(ValueError, match="2 stages at least"):
        backward_choices.build(backward_key, {**backward_choices.by_rule(backward_key)._asdict(), "stages": 1})


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_no_other_machine_has_anything_to_tune(arch: str) -> None:
    sizes = {
        "heads": 32,
        "groups": 8,
        "head_dim": 128,
        "value_dim": 128,
        "itemsize": 2,
        "causal": True,
        "context": 4096,
    }
    for family in FAMILIES.values():
        assert list(family.cases(arch)) == list(family.sized(sizes, arch)) == []
        (case,) = family.sized(sizes, "sm_90")
        assert (case.problem["h"], case.problem["g"]) == (32, 8)
        assert case.key in [one.key for one in family.cases("sm_90")]


def test_choices_compile_without_a_gpu() -> None:
    picked = [CASES[0], next(one for one in CASES if one[0] == "hopper.backward")]
    environment = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    device, jobs = offline("sm_90"), {}
    with Pool("longspan.autotune.compiler:Compiler", {"sources": [SOURCE]}, count=2, environment=environment) as pool:
        for name, case in picked:
            family = FAMILIES[name]
            for choice in (family.heuristic(case, "sm_90"), family.space(case, "sm_90")[-1]):
                jobs[name, canonical(choice)] = choice
                pool.submit(
                    (name, canonical(choice)), "compile", 300, family=name, case=case.fields, choice=dict(choice),
                    target=list(device.target), multiprocessors=132,
                )  # fmt: skip
        outcomes = {outcome.tag: outcome for outcome in every(pool)}
    assert set(outcomes) == set(jobs)
    for name, case in picked:
        served = outcomes[name, canonical(FAMILIES[name].heuristic(case, "sm_90"))]
        assert served.status == "ok", served.message
        assert illegal(served.value["resources"], device) is None
    # The last of a space is the deepest: it compiles, or does not fit; nothing else becomes of it.
    assert all(outcome.status == "ok" for outcome in outcomes.values()), [one.message for one in outcomes.values()]
