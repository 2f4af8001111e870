"""The benchmarks without a GPU: work by rule, a gate that refuses wrong kernels, absentees named, a current page."""

import json
import math
import random
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from longspan.backends import eager, sdpa

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the sources")
NAMES = ("cells", "ask", "peers", "gate", "clock", "record", "page", "plots", "race")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of benchmarks/, which are scripts and in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("matplotlib")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules: dict[str, ModuleType] = {name: import_module(name) for name in NAMES}
    return SimpleNamespace(**modules)


def small(bench: SimpleNamespace, section: str, **changed: Any) -> Any:
    """A cell of a section at a size for a CPU."""
    sizes = {"h": 2, "g": 1, "m": 40, "n": 40, "d": 16, "mask": "causal"} | changed
    return bench.cells.Cell(section=section, **sizes)


@pytest.mark.parametrize(
    ("name", "work", "unit"),
    [
        ("forward: b1 h16/16 d128 m16384 n16384 forward full", 2_199_023_255_552, "TFLOP/s"),
        ("forward: b4 h16/16 d128 m4096 n4096 forward causal", 274_877_906_944, "TFLOP/s"),
        ("backward: b1 h16/16 d128 m16384 n16384 backward full", 5_497_558_138_880, "TFLOP/s"),
        # 131072 queries see 4096 keys each, but for the first 4095, which see 1, 2, 3, …: 528 484 352 pairs
        ("forward: b1 h32/8 d128 m131072 n131072 forward window 4096", 8_658_687_623_168, "TFLOP/s"),
        ("growth: b1 h8/2 d128 m1048576 n1048576 forward causal", 2_251_799_813_685_248, "TFLOP/s"),
        ("decode: b1 h32/8 d128 m1 n8192 forward full", 33_554_432, "TB/s"),  # 2 · 8 · 8192 · 128 elements of 2 bytes
        ("decode: b64 h32/8 d128 m1 n8192 forward full", 2_147_483_648, "TB/s"),
        ("rotate: b1 h32/8 d128 m4096 n4096 forward", 83_886_080, "TB/s"),  # 40 heads, read and written
    ],
)
def test_work_is_counted_by_rule(bench: SimpleNamespace, name: str, work: int, unit: str) -> None:
    cell = next(cell for cell in bench.cells.cells() if cell.name == name)
    assert (cell.bytes if unit == "TB/s" else cell.flops) == work
    assert (cell.figure(0.5), cell.unit) == (pytest.approx(work / 0.5 / 1e12), unit)


def test_pairs_of_a_window_are_those_that_its_mask_shows(bench: SimpleNamespace) -> None:
    cell = small(bench, "forward", mask="window", window=7)
    i, j = torch.arange(40)[:, None], torch.arange(40)
    assert cell.pairs == int(((j <= i) & (i - 7 < j)).sum())


def test_cells_have_names_of_their_own_and_each_table_has_quick_ones(bench: SimpleNamespace) -> None:
    found = bench.cells.cells()
    assert len({cell.name for cell in found}) == len(found)
    assert {cell.section for cell in found if cell.quick} == set(bench.cells.SECTIONS)
    tables = [cell for cell in found if cell.section in {"forward", "backward"} and cell.h == cell.g]
    assert {(cell.b * cell.m, cell.h * cell.d) for cell in tables} == {(16_384, 2048)}


def test_every_gate_of_attention_has_dead_slots_and_sizes_that_no_tile_divides(bench: SimpleNamespace) -> None:
    for cell in bench.cells.cells():
        plain, *poisoned = bench.cells.problems(cell)
        assert plain.m % 16
        assert cell.rotates or plain.n % 16
        for problem in poisoned:
            _, k, v = problem.inputs().arguments
            assert k.isnan().any()
            assert v.isnan().any()
        assert bool(poisoned) != cell.rotates


class Planted:
    """A backend that attends well, except for one mistake."""

    def __init__(self, spoil: Callable[[Any], Any], **kept: Any) -> None:
        self.spoil, self.kept = spoil, kept

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Attend, and spoil the result."""
        return self.spoil(eager.attention(q, k, v, **{**options, **self.kept}))

    def rotate_qk(self, q: Tensor, k: Tensor, position: Tensor, rotation: Any) -> Any:
        """Rotate, and spoil the result."""
        return self.spoil(eager.rotate_qk(q, k, position, rotation))

    def declines(self, *_: Any, **__: Any) -> None:
        """Decline nothing."""


def entered(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, module: Any, *, own: bool = True) -> Any:
    """Enter a module as a contestant."""
    monkeypatch.setattr(bench.peers, "backend", lambda _: module)
    return bench.peers.Contestant("planted", ("forward",), bench.peers.own("planted"), own=own)


def dropped(state: Any) -> Any:
    """The values of the last key counted a little too much."""
    return state._replace(out=state.out * 1.03)


def leaking(state: Any) -> Any:
    """One element of one row is never written."""
    out = state.out.clone()
    out[0, 0, -1, -1] = math.nan
    return state._replace(out=out)


@pytest.mark.parametrize(("spoil", "backward"), [(dropped, False), (dropped, True), (leaking, False)])
def test_the_gate_refuses_wrong_attention(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], Any], backward: bool
) -> None:
    cell = small(bench, "forward", backward=backward)
    right = bench.gate.judge(entered(bench, monkeypatch, Planted(lambda state: state)), cell, "cpu")
    assert (right.outcome, right.reason) == ("passed", "")
    assert 0 < right.worst < 1
    wrong = bench.gate.judge(entered(bench, monkeypatch, Planted(spoil)), cell, "cpu")
    assert (wrong.outcome, wrong.worst) == ("failed", None)
    assert "exceeds budget" in wrong.reason


def test_the_gate_refuses_a_mask_that_is_off_by_one(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = import_module("longspan.spec.masks")
    early = Planted(lambda state: state, mask=masks.causal() & masks.window(99))
    cell = small(bench, "forward", mask="window", window=100)
    assert bench.gate.judge(entered(bench, monkeypatch, early), cell, "cpu").outcome == "failed"


def test_the_gate_refuses_a_wrong_rotation_and_its_gradient(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backward in (False, True):
        cell = small(bench, "rotate", backward=backward)
        for spoil, outcome in ((lambda qk: qk, "passed"), (lambda qk: (qk[0], 1.02 * qk[1]), "failed")):
            contestant = entered(bench, monkeypatch, Planted(spoil))
            assert bench.gate.judge(contestant, cell, "cpu").outcome == outcome


def test_a_backend_that_breaks_has_failed_and_a_peer_that_cannot_is_skipped(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        message = "no kernel image\nand more"
        raise RuntimeError(message)

    cell = small(bench, "forward")
    verdicts = [
        bench.gate.judge(entered(bench, monkeypatch, Planted(broken), own=own), cell, "cpu") for own in (True, False)
    ]
    assert [x.outcome for x in verdicts] == ["failed", "skipped"]
    assert {x.reason for x in verdicts} == {"RuntimeError: no kernel image"}
    modest = SimpleNamespace(declines=lambda *_, **__: "only on Sundays")
    verdict = bench.gate.judge(entered(bench, monkeypatch, modest), cell, "cpu")
    assert (verdict.outcome, verdict.reason) == ("skipped", "only on Sundays")


@pytest.mark.parametrize(("name", "section"), [("flash-attn-4", "forward"), ("liger-kernel", "rotate")])
def test_peers_that_are_not_installed_are_named(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, section: str
) -> None:
    for module in ("flash_attn", "flash_attn.cute", "liger_kernel", "liger_kernel.ops.rope"):
        monkeypatch.setitem(sys.modules, module, None)
    contestant = next(x for x in bench.peers.entrants(section) if x.name in {name, "Liger"})
    verdict = bench.gate.judge(contestant, small(bench, section), "cpu")
    assert verdict.outcome == "skipped"
    assert verdict.reason.startswith(f"{name} is not installed")


def test_sdpa_and_the_kernel_behind_it_pass_the_gate(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = small(bench, "forward")
    kernel = next(x for x in bench.peers.entrants("forward") if x.name == "SDPA FA2")
    for contestant in (entered(bench, monkeypatch, sdpa), kernel):
        assert bench.gate.judge(contestant, cell, "cpu").outcome == "passed"


@pytest.mark.parametrize(("n", "window"), [(333, None), (1024, None), (1024, 256), (1000, 100), (2048, 1000)])
def test_blocks_by_formula_are_those_of_all_pairs(bench: SimpleNamespace, n: int, window: int | None) -> None:
    made = bench.peers.blocks(n, n, window, torch.device("cpu"))
    truth = create_block_mask(made.mask_mod, None, None, n, n, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, found, expected = (
            getattr(truth, f"{kind}_num_blocks"), getattr(made, f"{kind}_indices"), getattr(truth, f"{kind}_indices"),
        )  # fmt: skip
        assert torch.equal(getattr(made, f"{kind}_num_blocks"), count)
        for row in range(count.shape[-1]):
            assert torch.equal(found[0, 0, row, : count[0, 0, row]], expected[0, 0, row, : count[0, 0, row]])


def test_pages_hold_the_keys_that_their_places_say(bench: SimpleNamespace) -> None:
    x = torch.randn(2, 3, 100, 4)
    places = torch.tensor([[3, 0], [1, 2]])
    pages = bench.peers.pool(x, places)
    assert pages.shape == (4, 3, 64, 4)
    for b in range(2):
        assert torch.equal(torch.cat([pages[places[b, 0]], pages[places[b, 1], :, :36]], 1), x[b])
        assert pages[places[b, 1], :, 36:].isnan().all()


def test_every_round_measures_everyone_once_and_orders_differ(bench: SimpleNamespace) -> None:
    order: list[str] = []

    def measured(name: str) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return float(len(order))

        return measure

    rests: list[None] = []
    times = bench.clock.rounds({x: measured(x) for x in "abcd"}, 6, random.Random(1), lambda: rests.append(None))
    turns = ["".join(order[i : i + 4]) for i in range(0, 24, 4)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abcd"}
    assert len(set(turns)) > 1
    assert ({len(x) for x in times.values()}, len(rests)) == ({6}, 24)


def test_a_reading_is_the_median_with_its_spread(bench: SimpleNamespace) -> None:
    reading = bench.clock.summary([4.0, 2.0, 3.0, 9.0, 1.0], "events")
    assert (reading.seconds, reading.rounds) == (3.0, 5)
    assert reading.spread == pytest.approx(8 / 3)


def raced(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[int, Any]:
    """Run the command with a pretended GPU, a gate that fails one and skips another, and a clock that reads 1 ms."""
    cell = small(bench, "forward", quick=True)
    planted = {
        "flash": bench.gate.Verdict("flash", "failed", "out exceeds budget"),
        "Liger": bench.gate.Verdict("Liger", "skipped", "of another table"),
        "FlexAttention": bench.gate.Verdict("FlexAttention", "skipped", "not today"),
        "flash-attn-4": bench.gate.Verdict("flash-attn-4", "skipped", "not installed"),
        "SDPA cuDNN": bench.gate.Verdict("SDPA cuDNN", "passed", worst=0.2),
        "SDPA FA2": bench.gate.Verdict("SDPA FA2", "passed", worst=0.25),
        "sdpa": bench.gate.Verdict("sdpa", "passed", worst=0.125),
    }
    for name, value in {
        "is_available": True, "get_device_name": "Pretended 9000", "synchronize": None, "empty_cache": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(bench.race, "cells", lambda: [cell])
    monkeypatch.setattr(bench.race, "gated", lambda _: {cell.features: dict(planted)})
    monkeypatch.setattr(bench.race, "of_cell", lambda cell, seed, _: bench.ask.of_cell(cell, seed, "cpu"))
    timed = lambda ready, *_, count: {name: bench.clock.summary([1e-3] * count, "events") for name in ready}  # noqa: E731
    monkeypatch.setattr(bench.race, "race", timed)
    code = bench.race.main(["--quick", "--out", str(tmp_path), *arguments])
    return code, json.loads((tmp_path / "pretended-9000.json").read_text("utf-8"))


def test_who_fails_gets_no_figure_and_the_run_says_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = raced(bench, monkeypatch, tmp_path, "--only", "forward")
    printed = capsys.readouterr().out
    assert code == 1
    assert "FAILED, and got no figure: flash: out exceeds budget" in printed
    (cell,) = results["sections"]["forward"]["cells"]
    assert [x["kernel"] for x in cell["readings"]] == ["SDPA FA2", "sdpa"]
    assert cell["failed"] == {"flash": "out exceeds budget"}
    assert cell["skipped"]["FlexAttention"] == "not today"
    # This machine has no cuDNN attention on its CPU: it passed the gate, and is out with the reason at full size.
    assert cell["skipped"]["SDPA cuDNN"].startswith("RuntimeError")
    assert "Liger" not in cell["skipped"]
    assert all(name in printed for name in ("FlexAttention", "not today", "SDPA FA2"))
    assert all(x["figure"] == pytest.approx(4 * 800 * 16 * 2 / 1e-3 / 1e12) for x in cell["readings"])


def test_tables_that_a_run_did_not_race_stay(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, first = raced(bench, monkeypatch, tmp_path)
    bench.record.save(tmp_path / "pretended-9000.json", "Pretended 9000", "rotate", {"date": "then", "cells": []})
    _, second = raced(bench, monkeypatch, tmp_path, "--only", "forward")
    assert second["sections"]["rotate"] == {"date": "then", "cells": []}
    assert (list(first["sections"]), list(second["sections"])) == (["forward"], ["forward", "rotate"])


def test_without_a_gpu_the_race_says_what_it_needs(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.race.main([]) == 2
    assert capsys.readouterr().out.startswith("race.py needs a GPU")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_results_are_whole(bench: SimpleNamespace, path: Path) -> None:
    results = bench.record.load(path)
    assert path.name == bench.record.path_of(results["device"], path.parent).name
    assert path.read_text("utf-8") == json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    known = {cell.name: cell for cell in bench.cells.cells()}
    for section, run in results["sections"].items():
        assert {"torch", "triton", "driver", "cuda", "flash-attn-4", "liger-kernel"} <= set(run["versions"])
        assert run["date"].endswith("Z")
        assert run["cells"]
        for found in run["cells"]:
            cell = known[found["name"]]
            assert (cell.section, cell.as_json()) == (section, found["cell"])
            assert found["failed"] == {}
            assert {x["kernel"] for x in found["readings"]}.isdisjoint(found["skipped"])
            for x in found["readings"]:
                assert section == "memory" or x["figure"] == pytest.approx(cell.figure(x["median_us"] * 1e-6), rel=1e-3)


def test_the_page_is_what_the_script_makes_of_the_results(bench: SimpleNamespace) -> None:
    text = bench.plots.PAGE.read_text("utf-8")
    assert text == bench.page.replaced(text, bench.plots.made(bench.plots.recorded()))


def test_pictures_and_tables_show_every_figure(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, results = raced(bench, monkeypatch, tmp_path)
    run = results["sections"]["forward"]
    monkeypatch.setattr(bench.plots, "IMAGES", tmp_path)
    bench.plots.mpl.use("Agg")
    path = bench.plots.draw(results["device"], "forward", run["cells"], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    text = bench.plots.made([results])
    assert f"images/{path.name}" in text
    assert "| problem | sdpa | SDPA FA2 |" in text
    assert "- flash failed in 1 of 1: out exceeds budget" in text
    assert bench.plots.panels("forward", run["cells"]) == {
        "d16, 2/1 heads, causal": {x: {40: results_of(run, x)} for x in ("SDPA FA2", "sdpa")}
    }


def results_of(run: dict[str, Any], kernel: str) -> float:
    """Figure of a contestant in the first cell."""
    return next(x["figure"] for x in run["cells"][0]["readings"] if x["kernel"] == kernel)
