"""The benchmarks without a GPU: work by rule, a gate that refuses wrong kernels, absentees named, rounds shuffled."""

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarked import BENCHMARKS, Bench, Patch, bench, small
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from longspan import spec
from longspan.backends import eager, sdpa
from longspan.spec import masks

__all__ = ["bench"]  # a fixture
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the sources")


@pytest.mark.parametrize(
    ("name", "work", "unit"),
    [
        ("forward: b1 h16/16 d128 m16384 n16384 forward full", 2_199_023_255_552, "TFLOP/s"),
        ("forward: b4 h16/16 d128 m4096 n4096 forward causal", 274_877_906_944, "TFLOP/s"),
        ("backward: b1 h16/16 d128 m16384 n16384 backward full", 5_497_558_138_880, "TFLOP/s"),
        # 131072 queries see 4096 keys each, but the first 4095, which see 1, 2, 3, …; packed: 24576²/2 + 12288²/2 + …
        ("forward: b1 h32/8 d128 m131072 n131072 forward window 4096", 8_658_687_623_168, "TFLOP/s"),
        ("growth: b1 h8/2 d128 m1048576 n1048576 forward causal", 2_251_799_813_685_248, "TFLOP/s"),
        ("features: b1 h32/8 d128 m65536 n65536 forward packed", 7_349_089_746_944, "TFLOP/s"),
        ("decode: b1 h32/8 d128 m1 n8192 forward full", 33_554_432, "TB/s"),  # 2 · 8 · 8192 · 128 elements of 2 bytes
        ("decode: b64 h32/8 d128 m1 n8192 forward full", 2_147_483_648, "TB/s"),
        ("rotate: b1 h32/8 d128 m4096 n4096 forward rotary", 83_886_080, "TB/s"),  # 40 heads, read and written
    ],
)
def test_work_is_counted_by_rule(bench: Bench, name: str, work: int, unit: str) -> None:
    cell = next(cell for cell in bench.cells.cells() if cell.name == name)
    assert (cell.bytes if unit == "TB/s" else cell.flops) == work
    assert (cell.figure(0.5), cell.unit) == (pytest.approx(work / 0.5 / 1e12), unit)


def test_cells_have_names_of_their_own_and_count_the_pairs_that_are_seen(bench: Bench) -> None:
    found = bench.cells.cells()
    assert len({cell.name for cell in found}) == len(found)
    assert {cell.section for cell in found if cell.quick} == set(bench.cells.SECTIONS)
    i, j = torch.arange(40)[:, None], torch.arange(40)
    assert small(bench, mask="window", window=7).pairs == int(((j <= i) & (i - 7 < j)).sum())
    tables = [cell for cell in found if cell.section in {"forward", "backward"} and cell.h == cell.g]
    assert {(cell.b * cell.m, cell.h * cell.d) for cell in tables} == {(16_384, 2048)}


def test_every_gate_of_attention_has_dead_slots_and_sizes_that_no_tile_divides(bench: Bench) -> None:
    for cell in bench.cells.cells():
        plain, *poisoned = bench.cells.problems(cell)
        assert cell.decodes or plain.m % 32
        assert cell.rotary or plain.n % 32
        for problem in poisoned:
            _, k, v = problem.inputs().arguments
            assert k.isnan().any()
            assert v.isnan().any()
        assert bool(poisoned) != cell.rotary


class Planted:
    """A backend that attends well, except for one mistake."""

    def __init__(self, spoil: Callable[[Any, Any], Any], **kept: Any) -> None:
        self.spoil, self.kept = spoil, kept

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Attend, and spoil the result."""
        return self.spoil(eager.attention(q, k, v, **{**options, **self.kept}), v)

    def rotate_qk(self, q: Tensor, k: Tensor, position: Tensor, rotation: Any) -> Any:
        """Rotate, and spoil the result."""
        return self.spoil(eager.rotate_qk(q, k, position, rotation), None)

    def declines(self, *_: Any, **__: Any) -> None:
        """Decline nothing."""


def entered(bench: Bench, monkeypatch: Patch, module: Any, *, own: bool = True) -> Any:
    """Enter a module as a contestant."""
    monkeypatch.setattr(bench.peers, "backend", lambda _: module)
    return bench.peers.Contestant("planted", ("forward",), bench.peers.own("planted"), own=own)


def unwritten(state: Any, _: Any) -> Any:
    """Leave one element of one row as it was before."""
    state.out[0, 0, -1, -1] = math.nan
    return state


WINDOW = masks.causal() & masks.window(99)
WRONG = {
    "weights of sum 1.03": ({}, Planted(lambda state, _: state._replace(out=state.out * 1.03))),
    "gradients off by 3 %": ({"backward": True}, Planted(lambda state, _: state._replace(out=state.out * 1.03))),
    "dead slots that leak": ({}, Planted(lambda state, v: state._replace(out=state.out + 0 * v.mean()))),
    "an element never written": ({}, Planted(unwritten)),
    "a window off by one": ({"mask": "window", "window": 100}, Planted(lambda state, _: state, mask=WINDOW)),
    "keys off by 2 %": ({"section": "rotate"}, Planted(lambda qk, _: (qk[0], 1.02 * qk[1]))),
    "rotated gradients": ({"section": "rotate", "backward": True}, Planted(lambda qk, _: (qk[0], 1.02 * qk[1]))),
}


@pytest.mark.parametrize("bug", WRONG)
def test_the_gate_refuses_what_is_wrong_and_passes_what_is_right(bench: Bench, monkeypatch: Patch, bug: str) -> None:
    features, module = WRONG[bug]
    cell = small(bench, **features)
    right = bench.gate.judge(entered(bench, monkeypatch, Planted(lambda result, _: result)), cell, "cpu")
    assert (right.outcome, right.reason) == ("passed", "")
    assert 0 < right.worst < 1
    wrong = bench.gate.judge(entered(bench, monkeypatch, module), cell, "cpu")
    assert (wrong.outcome, wrong.worst) == ("failed", None)
    assert "exceeds budget" in wrong.reason


class Rounding:
    """A backend that attends to quantised heads, but for what it takes the values' scales for."""

    def __init__(self, values: Callable[[spec.Quantised], spec.Quantised]) -> None:
        self.values = values

    def quantise(self, *heads: Tensor) -> list[spec.Quantised]:
        """Quantise."""
        return [spec.quantise(x) for x in heads]

    def attention_quantised(self, q: spec.Quantised, k: spec.Quantised, v: spec.Quantised, **options: Any) -> Any:
        """Attend."""
        return spec.attention_quantised(q, k, self.values(v), **options)

    def declines(self, *_: Any, **__: Any) -> None:
        """Decline nothing."""


@pytest.mark.parametrize("inside", [False, True])
def test_heads_of_eight_bits_are_held_to_attention_to_them(bench: Bench, monkeypatch: Patch, inside: bool) -> None:
    enter = bench.peers.e4m3(inside=inside)
    contestant = bench.peers.Contestant("planted", ("quantised",), enter, own=True, rounded=True)
    cell = small(bench, "quantised")
    monkeypatch.setattr(bench.peers, "backend", lambda _: Rounding(lambda v: v))
    assert bench.gate.judge(contestant, cell, "cpu").outcome == "passed"
    assert bench.gate.judge(replace(contestant, rounded=False), cell, "cpu").outcome == "failed"
    monkeypatch.setattr(bench.peers, "backend", lambda _: Rounding(lambda v: v._replace(scale=1.3 * v.scale)))
    assert bench.gate.judge(contestant, cell, "cpu").outcome == "failed"


def test_a_backend_that_breaks_has_failed_and_a_peer_that_cannot_is_skipped(bench: Bench, monkeypatch: Patch) -> None:
    def broken(*_: Any) -> Any:
        message = "no kernel image\nand more"
        raise RuntimeError(message)

    modest = SimpleNamespace(declines=lambda *_, **__: "only on Sundays")
    for module, own, outcome, reason in (
        (sdpa, True, "passed", ""),
        (Planted(broken), True, "failed", "RuntimeError: no kernel image"),
        (Planted(broken), False, "skipped", "RuntimeError: no kernel image"),
        (modest, True, "skipped", "only on Sundays"),
    ):
        verdict = bench.gate.judge(entered(bench, monkeypatch, module, own=own), small(bench), "cpu")
        assert (verdict.outcome, verdict.reason) == (outcome, reason)


def test_who_kills_its_process_has_failed_and_the_next_is_still_gated(bench: Bench, monkeypatch: Patch) -> None:
    def process(command: list[str], **_: Any) -> Any:
        waiting = command[command.index("--kernels") + 1 :]
        lived = waiting[: waiting.index("sdpa")] if "sdpa" in waiting else waiting
        lines = [json.dumps({"kernel": name, "outcome": "passed", "worst": 0.5}) for name in lived]
        return SimpleNamespace(stdout="\n".join(lines), stderr="", returncode=-11)

    monkeypatch.setattr(bench.gate.subprocess, "run", process)
    verdicts = bench.gate.guarded([small(bench)])
    assert list(verdicts) == [x.name for x in bench.peers.entrants("forward")]
    assert {name for name, x in verdicts.items() if x.outcome != "passed"} == {"sdpa"}
    assert verdicts["sdpa"].reason.startswith("its process ended with -11")


@pytest.mark.parametrize(("name", "section"), [("flash-attn-4", "forward"), ("liger-kernel", "rotate")])
def test_peers_that_are_not_installed_are_named(bench: Bench, monkeypatch: Patch, name: str, section: str) -> None:
    for module in ("flash_attn", "flash_attn.cute", "liger_kernel", "liger_kernel.ops.rope"):
        monkeypatch.setitem(sys.modules, module, None)
    contestant = next(x for x in bench.peers.entrants(section) if x.name in {name, "Liger"})
    verdict = bench.gate.judge(contestant, small(bench, section), "cpu")
    assert (verdict.outcome, verdict.reason.split(" (")[0]) == ("skipped", f"{name} is not installed")


@pytest.mark.parametrize(("n", "window"), [(333, None), (1024, None), (1024, 256), (1000, 100), (2048, 1000)])
def test_blocks_by_formula_are_those_of_all_pairs(bench: Bench, n: int, window: int | None) -> None:
    made = bench.peers.blocks(n, n, window, torch.device("cpu"))
    truth = create_block_mask(made.mask_mod, None, None, n, n, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        found, expected = ([getattr(x, f"{kind}_{part}") for part in ("num_blocks", "indices")] for x in (made, truth))
        assert torch.equal(found[0], expected[0])
        for row, count in enumerate(expected[0][0, 0].tolist()):
            assert torch.equal(found[1][0, 0, row, :count], expected[1][0, 0, row, :count])


def test_pages_hold_the_keys_that_their_places_say(bench: Bench) -> None:
    x, places = torch.randn(2, 3, 100, 4), torch.tensor([[3, 0], [1, 2]])
    pages = bench.peers.pool(x, places)
    for b in range(2):
        assert torch.equal(torch.cat([pages[places[b, 0]], pages[places[b, 1], :, :36]], 1), x[b])
        assert pages[places[b, 1], :, 36:].isnan().all()


def test_every_round_measures_everyone_once_and_orders_differ(bench: Bench) -> None:
    order: list[str] = []
    measures = {name: lambda name=name: order.append(name) or 1.0 for name in "abcd"}
    times = bench.clock.rounds(measures, 6, random.Random(1), lambda: order.append("-"))
    turns = ["".join(order[i : i + 8]) for i in range(0, 48, 8)]
    assert {"".join(sorted(turn)) for turn in turns} == {"----abcd"}
    assert all(turn[::2] == "----" for turn in turns)  # rested before each
    assert len(set(turns)) > 1
    assert times == {name: [1.0] * 6 for name in "abcd"}


def test_a_reading_is_the_median_with_its_spread(bench: Bench) -> None:
    reading = bench.clock.summary([4.0, 2.0, 3.0, 9.0, 1.0], "events")
    assert (reading.seconds, reading.rounds) == (3.0, 5)
    assert reading.spread == pytest.approx(8 / 3)
