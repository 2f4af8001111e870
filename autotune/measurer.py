"""The servant of a measuring worker: it verifies a choice before it times it, and holds one problem's arguments.

What it launches may hang its GPU, fault or abort; the coordinator writes down what is about to run, and kills this
process. Which numbers are right is not known here: a gate, handed in by import string, says so.
"""

import copy
import os
import statistics
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from .family import Case, Values, canonical, families, imported
from .lookup import override
from .race import CUT, LAUNCHES, MORE

WARM: Final = 3  # launches of a finalist before the first round
REPEATS: Final = 8  # launches of a winner that must agree bit by bit
P = ParamSpec("P")
R = TypeVar("R")


def alive(method: Callable[Concatenate["Measurer", P], R]) -> Callable[Concatenate["Measurer", P], R]:
    """End the process where an exception has left the device unusable: every later choice would fail for it.

    A fault on a GPU is an ordinary exception, after which all that is asked of the device raises.
    """

    @wraps(method)
    def run(self: "Measurer", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            try:
                self.clock.rest()
            except Exception:  # noqa: BLE001 - whatever it is, the device does not answer
                traceback.print_exc()
                os._exit(os.EX_SOFTWARE)
            raise

    return run


class Measurer:
    """Verifies and times choices of families.

    Args:
        sources: Import strings of sequences of families.
        gate: Import string of a function of a family, a case, a device and whether to take the tuned problem itself.
            It runs the kernel under the choice in force, returns the worst error as a fraction of what is allowed, and
            raises AssertionError where that is exceeded.
        clock: Import string of the class of a `Clock`.
        index: Number of the device.
    """

    def __init__(self, sources: list[str], gate: str, clock: str, index: int | None = None) -> None:
        self.families, self.gate = families(sources), imported(gate)
        self.clock = imported(clock)() if index is None else imported(clock)(index)
        self.held: tuple[str, list[Callable[[], Any]]] = ("", [])

    def describe(self) -> dict[str, Any] | None:
        """Describe the device."""
        return self.clock.describe()

    @alive
    def trial(
        self, family: str, case: dict[str, Any], choice: dict[str, Any], best: float | None = None
    ) -> dict[str, Any]:
        """Verify a choice on small ragged problems, then launch it: twice, and more often if it keeps up.

        Args:
            family: Name of the family.
            case: Fields of the case.
            choice: The choice.
            best: Seconds of the fastest choice so far.
        """
        owner, of = self.families[family], Case(**case)
        with override({family: choice}):
            try:
                worst = self.gate(owner, of, self.clock.device, whole=False)
            except AssertionError as wrong:
                return {"status": "wrong", "note": str(wrong)}
            meter = self.clock.meter(self.calls(family, of))
            times = meter(LAUNCHES)
            if best is None or statistics.median(times) <= CUT * best:
                times += meter(MORE)
        return {"status": "raced", "worst": worst, "times": times}

    @alive
    def final(
        self, family: str, case: dict[str, Any], choices: list[dict[str, Any]], rounds: int, launches: int
    ) -> dict[str, list[float]]:
        """Race in rounds, forth and back, so that a drift meets all alike; seconds of the rounds by choice."""
        of = Case(**case)
        calls = self.calls(family, of)
        meters = []
        for choice in choices:
            with override({family: choice}):
                meters.append(self.clock.meter(calls))
                meters[-1](WARM)
        times: dict[str, list[float]] = {canonical(choice): [] for choice in choices}
        for turn in range(rounds):
            order = range(len(choices)) if turn % 2 == 0 else reversed(range(len(choices)))
            for at in order:
                self.clock.rest()
                with override({family: choices[at]}):
                    meters[at](1)  # clocks fell, caches are another's
                    times[canonical(choices[at])].append(statistics.median(meters[at](launches)))
        return times

    @alive
    def confirm(
        self, family: str, case: dict[str, Any], choice: dict[str, Any], relatives: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """Verify a winner on the problem that it was tuned for, and see that it repeats bit by bit.

        Args:
            family: Name of the family.
            case: Fields of the case.
            choice: The choice.
            relatives: Fields of cases of the same key that compile other code; these are small problems only.
        """
        owner, of = self.families[family], Case(**case)
        with override({family: choice}):
            try:
                worst = max(self.gate(owner, of, self.clock.device, whole=whole) for whole in (False, True))
                for other in relatives:
                    worst = max(worst, self.gate(owner, Case(**other), self.clock.device, whole=False))
            except AssertionError as wrong:
                return {"status": "wrong", "note": str(wrong)}
            call = self.calls(family, of)[0]
            first = copied(call())
            for _ in range(REPEATS - 1):
                if not same(first, call()):
                    return {"status": "wrong", "note": "two launches on the same arguments differ in their bits"}
        return {"status": "verified", "worst": worst, "repeated": True}

    def calls(self, family: str, case: Case) -> list[Callable[[], Any]]:
        """Prepare the tuned problem; the last one is kept, since choices of a key come one after the other."""
        name = f"{family} {canonical(case.problem)} {case.name}"
        if self.held[0] != name:
            self.held = ("", [])  # before the next is made: two may not fit
            prepare, device = self.families[family].prepare, self.clock.device
            self.held = (name, self.clock.copies(lambda: prepare(case, device, True)))  # noqa: FBT003 - filled in
        return self.held[1]


def copied(results: Any) -> list[Any]:
    """Keep what a launch returned from being written over by the next."""
    return [copy.deepcopy(x) for x in (results if isinstance(results, list | tuple) else [results]) if x is not None]


def same(first: list[Any], again: Any) -> bool:
    """Compare bit by bit, where NaN is NaN."""
    results = [x for x in (again if isinstance(again, list | tuple) else [again]) if x is not None]
    return len(first) == len(results) and all(alike(x, y) for x, y in zip(first, results, strict=True))


def alike(x: Any, y: Any) -> bool:
    """Whether two results hold the same bytes."""
    if not hasattr(x, "contiguous"):
        return x == y
    import torch  # noqa: PLC0415 - a worker alone measures

    return torch.equal(*(one.contiguous().reshape(-1).view(torch.uint8) for one in (x, y)))


def reproducer(
    sources: list[str], gate: str, clock: str, family: str, case: Case, choice: Values, relatives: Sequence[Case] = ()
) -> str:
    """Write a program that tries one choice again."""
    others = [other.fields for other in relatives]
    return (
        "from longspan.autotune.measurer import Measurer\n\n"
        f"measurer = Measurer({sources!r}, {gate!r}, {clock!r})\n"
        f"asked = {family!r}, {case.fields!r}, {dict(choice)!r}\n"
        "tried = measurer.trial(*asked)\n"
        f'print(tried if tried["status"] == "wrong" else measurer.confirm(*asked, {others!r}))\n'
    )
