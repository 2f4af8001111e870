"""Race longspan's kernels beside their peers on this machine's GPU, and record what was measured.

    python benchmarks/race.py --quick                    # a few problems of each table
    python benchmarks/race.py --only decode rotate       # some tables, whole

Every contestant conforms to the error budget before it is timed (`gate`), and is timed as `clock` says. A contestant
that fails gets no figure, and the exit code is 1. Without a GPU the exit code is 2.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from ask import Ask, Call, bind, of_cell
from cells import SECTIONS, Cell, cells
from clock import ROUNDS, Reading, peak, race, race_on_host
from gate import Verdict, groups, guarded, verdict_of
from peers import CEILINGS, Contestant, entrants
from record import RESULTS, entry, memory_entry, now, path_of, save, significant, versions

Verdicts = dict[str, Verdict]
PATIENCE: Final = 3.0  # seconds of compilation that pass without a word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Race longspan's kernels beside their peers on this machine's GPU.")
    parser.add_argument("--quick", action="store_true", help="a few problems of each table")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these tables alone")
    parser.add_argument("--match", default="", metavar="TEXT", help="cells whose name holds it, as this prints them")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"race.py needs a GPU that PyTorch can use (CUDA or ROCm), and torch {torch.__version__} finds none here."
        )
        return 2
    raced = [
        cell
        for cell in cells()
        if cell.section in asked.only and asked.match in cell.name and (cell.quick or not asked.quick)
    ]
    device = torch.cuda.get_device_name()
    begin = time.monotonic()
    # Many gates compile side by side: a pool of compilers in each would only contend.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    print(f"{device}: {len(raced)} cells; every contestant conforms first", flush=True)
    verdicts = gated(raced)
    print(f"gated in {time.monotonic() - begin:.0f} s", flush=True)
    runs: list[dict[str, Any]] = []
    for section in dict.fromkeys(cell.section for cell in raced):
        chosen = [cell for cell in raced if cell.section == section]
        runs.append({"date": now(), "quick": asked.quick, "versions": versions(), "cells": []})
        for cell in chosen:
            runs[-1]["cells"].append(run_cell(cell, verdicts[cell.features], asked.rounds))
            save(path_of(device, asked.out), device, section, runs[-1])  # what is cut short leaves what it measured
    print(f"wrote {path_of(device, asked.out)} after {time.monotonic() - begin:.0f} s")
    return conclude(runs)


def gated(raced: Sequence[Cell]) -> dict[tuple[Any, ...], Verdicts]:
    """Gate all groups side by side, before anything is timed."""
    found = groups(raced)
    # Each process takes a core to compile and some memory of the card to check.
    fit = torch.cuda.get_device_properties().total_memory // (8 * 2**30)
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, fit))) as pool:
        return dict(pool.map(gated_group, found))


def gated_group(group: Sequence[Cell]) -> tuple[tuple[Any, ...], Verdicts]:
    """Gate one group and print what it took."""
    begin = time.monotonic()
    verdicts = guarded(group)
    passed = ", ".join(name for name, verdict in verdicts.items() if verdict.outcome == "passed")
    print(f"  {time.monotonic() - begin:4.0f} s  {group[0].name}: {passed or 'nobody'} passed", flush=True)
    return group[0].features, verdicts


def run_cell(cell: Cell, verdicts: Verdicts, count: int) -> dict[str, Any]:
    """Race one cell and print its table."""
    names = {contestant.name for contestant in entrants(cell.section)}
    verdicts = {name: verdict for name, verdict in verdicts.items() if name in names}
    print(f"\n{cell.name}", flush=True)
    with nullcontext() if cell.backward else torch.no_grad():
        if cell.section == "memory":
            result = memory_entry(cell, peaks(cell, verdicts), verdicts)
        else:
            result = entry(cell, timed(cell, verdicts, count), verdicts)
    for line in lines(result):
        print(f"  {line}")
    sys.stdout.flush()
    torch.cuda.empty_cache()
    return result


def passed(cell: Cell, verdicts: Verdicts) -> list[Contestant]:
    """Contestants that may race."""
    return [contestant for contestant in entrants(cell.section) if verdicts[contestant.name].outcome == "passed"]


def timed(cell: Cell, verdicts: Verdicts, count: int) -> dict[str, Reading]:
    """Time those that conform; who cannot run at this size is taken out, with the reason."""
    asks: dict[int, Ask] = {}
    racing = {contestant.name: contestant for contestant in passed(cell, verdicts)}

    def enter(name: str, copy: int) -> Call:
        if copy not in asks:
            asks[copy] = of_cell(cell, copy, "cuda")
        return bind(asks[copy], racing[name].prepare(asks[copy]))

    ready: dict[str, Call] = {}
    for name, contestant in racing.items():
        with out_with(contestant, verdicts):
            ready[name] = once(name, lambda name=name: enter(name, 0))
    if cell.section == "host":
        return race_on_host(ready, count=count)
    return race(ready, enter, cell.bytes, count=count)


def peaks(cell: Cell, verdicts: Verdicts) -> dict[str, int]:
    """Peak memory of those that conform."""
    ask, found = of_cell(cell, 0, "cuda"), {}
    for contestant in passed(cell, verdicts):

        def both(contestant: Contestant = contestant) -> list[torch.Tensor]:
            leaves = [x.detach().requires_grad_() for x in ask.inputs]
            results = contestant.prepare(ask)(*leaves)
            return [*results, *torch.autograd.grad(results, leaves, ask.cotangents)]

        with out_with(contestant, verdicts):
            found[contestant.name] = peak(once(contestant.name, lambda both=both: both))
    return found


def once(name: str, enter: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """Enter a contestant and run it, so that what it lacks shows before anything is timed."""
    begin = time.monotonic()
    call = enter()
    call()
    torch.cuda.synchronize()
    if time.monotonic() - begin > PATIENCE:
        print(f"  {name} was ready after {time.monotonic() - begin:.0f} s", flush=True)
    return call


@contextmanager
def out_with(contestant: Contestant, verdicts: Verdicts) -> Iterator[None]:
    """Take a contestant out of a cell that it cannot run, and record why."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no figure
        verdicts[contestant.name] = verdict_of(contestant, error)


def lines(result: dict[str, Any]) -> list[str]:
    """Describe a cell's results, best first."""
    readings = result["readings"]
    if readings and "extra_bytes" in readings[0]:
        text = [f"{x['kernel']:22} {x['extra_bytes'] / 2**20:10.1f} MiB" for x in readings]
    else:
        best = min((x["median_us"] for x in readings if x["kernel"] not in CEILINGS), default=1.0)
        text = [
            f"{x['kernel']:22} {x['figure']:8.4g} {x['unit']}  {x['median_us']:10.6g} µs ±{x['spread'] * 50:.1f} %"
            f"  {significant(best / x['median_us'], 3):.2f} × best"
            + ("" if x["eager_us"] is None else f"  eager {x['eager_us']:.4g} µs")
            for x in sorted(readings, key=lambda x: x["median_us"])
        ]
    for outcome in ("failed", "skipped"):
        text += [f"{name:22} {outcome}: {reason}" for name, reason in result[outcome].items()]
    return text


def conclude(runs: Sequence[dict[str, Any]]) -> int:
    """Say who failed; return the exit code."""
    failed = {(name, reason) for run in runs for cell in run["cells"] for name, reason in cell["failed"].items()}
    for kernel, reason in sorted(failed):
        print(f"FAILED, and got no figure: {kernel}: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
