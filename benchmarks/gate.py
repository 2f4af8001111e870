"""No figure without conformance: every contestant is first held to the error budget of the laws.

Each group of cells with the same features is gated by a process of its own, so that a kernel that crashes takes
nothing with it, and so that the groups compile side by side into the caches that the race then finds full. The problem
is small and ragged; backends of this project also meet one whose dead slots hold NaN.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from ask import Ask, bind, of_cell, of_problem
from cells import Cell, cells, problems
from peers import Contestant, Skipped, entrants, why
from torch import Tensor

from longspan.backends import Unsupported
from longspan.laws import Attention, Bound, Rotate, attention_bounds, worst
from longspan.laws.quantised import quantised_bounds
from longspan.laws.rotation import bound
from longspan.spec import Rotation, quantise

SECONDS: Final = 300  # that one group may take to compile and conform
HEAVIEST: Final = 2e14  # operations of a cell that is also run here once, to fill the caches


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a contestant.

    Attributes:
        kernel: Its name.
        outcome: Whether it races.
        reason: Why not.
        worst: Largest error as a fraction of the budget.
    """

    kernel: str
    outcome: Literal["passed", "failed", "skipped"]
    reason: str = ""
    worst: float | None = None


def judge(contestant: Contestant, cell: Cell, device: torch.device | str) -> Verdict:
    """Hold a contestant to the budget on the problems of a cell's features."""
    try:
        asked = problems(cell)[: None if contestant.own else 1]
        ratio = max(conforms(contestant, cell, problem, device) for problem in asked)
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no figure
        return verdict_of(contestant, error)
    return Verdict(contestant.name, "passed", worst=ratio)


def verdict_of(contestant: Contestant, error: Exception) -> Verdict:
    """Tell a refusal from a failure: peers say in many ways that they do not serve a problem, this project in one."""
    declined = isinstance(error, Skipped | Unsupported)
    wrong = (
        isinstance(error, AssertionError | ArithmeticError) or "CUDA error" in str(error) or "HIP error" in str(error)
    )
    failed = wrong or (contestant.own and not declined)
    return Verdict(contestant.name, "failed" if failed else "skipped", why(error))


def conforms(contestant: Contestant, cell: Cell, problem: Attention | Rotate, device: torch.device | str) -> float:
    """Run one problem and return the worst error as a fraction of its budget.

    Raises:
        AssertionError: When it is over budget.
    """
    ask = of_problem(cell, problem, device)
    results = bind(ask, contestant.prepare(ask))()
    again = of_problem(cell, problem, device)  # a contestant may turn its arguments in place
    if contestant.name == "device copy":
        return same("the copy", results, (torch.cat([x.flatten() for x in again.inputs]),))
    if contestant.name == "read sweep":
        return same("a sum", results, (sums(*again.inputs[1:]),))
    bounds = rounded_limits(again) if contestant.rounded else limits(again)
    return max(worst(name, x, limit) for x, (name, limit) in zip(results, bounds.items(), strict=True))


def sums(k: Tensor, v: Tensor) -> Tensor:
    """What reading keys and values must add up to, stretch by stretch."""
    from sweep import stretch  # noqa: PLC0415 - needs triton

    k, v = (x.reshape(-1).view(torch.int32).long() for x in (k, v))
    words = k + v
    size = stretch(len(words))
    return torch.cat([words, words.new_zeros(-len(words) % size)]).view(-1, size).sum(1)


def same(name: str, found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Compare bit for bit."""
    for x, y in zip(found, truth, strict=True):
        if not torch.equal(x, y):
            message = f"{name} is not exact"
            raise AssertionError(message)
    return 0.0


def limits(ask: Ask) -> dict[str, Bound]:
    """True results of an ask, and how far from them each element may be."""
    if ask.cell.rotary:
        position, rotation = ask.options["position"], ask.options["rotation"]
        back = Rotation(-rotation.inv_freq, rotation.attention_factor)
        turned, along = (ask.cotangents, back) if ask.cotangents else (ask.inputs, rotation)
        return {name: bound(x, position, along, "half") for name, x in zip(("q", "k"), turned, strict=True)}
    found = attention_bounds(*ask.inputs, d_out=ask.cotangents[0] if ask.cotangents else None, **ask.options)
    return {name: found[name] for name in (("dq", "dk", "dv") if ask.cotangents else ("out",))}


def rounded_limits(ask: Ask) -> dict[str, Bound]:
    """The same of attention to the inputs' e4m3 roundings."""
    return {"out": quantised_bounds(*(quantise(x) for x in ask.inputs), **ask.plain)["out"]}


def warm(contestant: Contestant, group: Sequence[Cell], device: str) -> None:
    """Run the cells once, so that what is compiled per shape is compiled here too."""
    for cell in group:
        if cell.flops < HEAVIEST:
            try:
                ask = of_cell(cell, 0, device)
                bind(ask, contestant.prepare(ask))()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - the race itself will meet it, and say so
                print(f"{contestant.name} at {cell.name}: {why(error)}", file=sys.stderr)
        torch.cuda.empty_cache()


def groups(raced: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share a gate."""
    found: dict[tuple[object, ...], list[Cell]] = {}
    for cell in raced:
        found.setdefault(cell.features, []).append(cell)
    return list(found.values())


def contestants(group: Sequence[Cell]) -> list[Contestant]:
    """Contestants of any cell of a group, each once."""
    return list({entrant.name: entrant for cell in group for entrant in entrants(cell.section)}.values())


def guarded(group: Sequence[Cell]) -> dict[str, Verdict]:
    """Gate a group in processes of its own: whoever kills one has failed, and the next takes up behind it."""
    verdicts: dict[str, Verdict] = {}
    waiting = [contestant.name for contestant in contestants(group)]
    while waiting:
        names = [cell.name for cell in group]
        command = [sys.executable, str(Path(__file__)), "--cells", *names, "--kernels", *waiting]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603
            printed, end = done.stdout, f"its process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        except subprocess.TimeoutExpired as late:
            printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            end = f"it did not end within {SECONDS} s"
        for line in printed.splitlines():
            if line.startswith("{"):
                verdict = Verdict(**json.loads(line))
                verdicts[verdict.kernel] = verdict
        waiting = [name for name in waiting if name not in verdicts]
        if waiting:
            verdicts[waiting[0]] = Verdict(waiting[0], "failed", end)
            del waiting[0]
    return verdicts


def main() -> None:
    """Gate one group and print a verdict a line, as soon as it is known."""
    parser = argparse.ArgumentParser(description="Gate one group of cells.")
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--kernels", nargs="+", required=True)
    asked = parser.parse_args()
    group = [cell for cell in cells() if cell.name in asked.cells]
    for contestant in contestants(group):
        if contestant.name not in asked.kernels:
            continue
        verdict = judge(contestant, group[0], "cuda")
        if verdict.outcome == "passed":
            warm(contestant, [cell for cell in group if contestant in entrants(cell.section)], "cuda")
        print(json.dumps(asdict(verdict)), flush=True)


if __name__ == "__main__":
    main()
