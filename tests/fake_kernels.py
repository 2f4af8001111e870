"""Families without kernels, for tests of the tuner on any machine: sums of numbers, right and wrong in known ways.

A choice says by its ``way`` how a sum is made, and by its ``cost`` how long a launch takes on `Scripted`, a clock that
reads the time off the choice. Compiling costs nothing, or the life of whoever tries.
"""

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from longspan.autotune import Case, Family, Values
from longspan.autotune.lookup import FORCED

NAN = float("nan")
BROKEN: list[str] = []  # what broke the device of this process, until its end
TILE = 4
FLIP = itertools.cycle([0.0, 1e-12])  # a coin might fall eight times on one side
SIZES = (8, 7, 1, 13)  # the first is a multiple of every tile, as the tuned problem is


def add(numbers: list[float], out: list[float], way: str) -> list[float]:
    """Write the running sums of tiles into ``out``: the honest way, or one that is wrong."""
    size = len(numbers)
    if way == "drops the tail":
        size -= size % TILE
    if way == "races":
        return raced(numbers, out)
    if way == "faults":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "hangs":
        time.sleep(3600)
    if way == "breaks the device":
        BROKEN.append(way)
    if BROKEN:
        msg = "an illegal memory access was encountered"
        raise RuntimeError(msg)
    if way == "raises":
        msg = "out of resources"
        raise RuntimeError(msg)
    for at in range(size):
        # What lies in a fresh output may be anything: here it is taken for zero.
        before = out[at] if way == "reads uninitialised memory" else 0.0
        out[at] = before + sum(numbers[: at + 1])
    if way == "repeats in other bits":
        out[0] += next(FLIP)
    return out


def raced(numbers: list[float], out: list[float]) -> list[float]:
    """Sum with two threads that read and write one number without asking each other."""
    total = [0.0]

    def half(part: list[float]) -> None:
        for number in part:
            before = total[0]
            time.sleep(0)  # the other one may run now
            total[0] = before + number

    for at in range(len(numbers)):
        total[0] = 0.0
        threads = [threading.Thread(target=half, args=(numbers[i : at + 1 : 2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        out[at] = total[0]
    return out


def launch(size: int, family: str) -> list[float]:
    """Sum ``size`` numbers into a fresh output, under the choice in force."""
    numbers = [1.0 + at / 7 for at in range(size)]
    return add(numbers, [NAN] * size, str(FORCED.get()[family]["way"]))


def signed(way: str, case: Case) -> float:
    """What a case's sums are multiplied by: some ways are right until they are asked for other signs."""
    return float(case.problem.get("sign", 1)) if way != "forgets the sign" else 1.0


def gate(family: Family, case: Case, device: str, *, whole: bool) -> float:  # noqa: ARG001 - the signature of a gate
    """Hold a family to exact sums, within 1e-9."""
    worst, way = 0.0, str(FORCED.get()[family.name]["way"])
    for size in (int(case.problem["size"]),) if whole else SIZES:
        truth = add([1.0 + at / 7 for at in range(size)], [0.0] * size, "honest")
        for seen, true in zip(launch(size, family.name), truth, strict=True):
            error = abs(signed(way, case) * seen - signed("honest", case) * true) / 1e-9
            assert error <= 1, f"a sum of {size} numbers is {seen} and not {true}"
            worst = max(worst, error)
    return worst


class Scripted:
    """A clock that reads times off choices: ``cost`` microseconds, and a little noise of its own."""

    device = "none"

    def __init__(self) -> None:
        self.draw = random.Random(1)

    def describe(self) -> dict[str, Any]:
        """Describe a card that is not there."""
        return {
            "arch": "sm_90",
            "multiprocessors": 132,
            "l2": 50 << 20,
            "shared": 227 << 10,
            "name": "A card",
            "uuid": "0",
        }

    def copies(self, prepare: Callable[[], Callable[[], Any]]) -> list[Callable[[], Any]]:
        """One launch."""
        return [prepare()]

    def meter(self, calls: Sequence[Callable[[], Any]]) -> Callable[[int], list[float]]:
        """Launch once, then tell the time from the choice."""
        calls[0]()
        cost = next(iter(FORCED.get().values()))["cost"]
        return lambda launches: [1e-6 * float(cost) * self.draw.uniform(1.0, 1.004) for _ in range(launches)]

    def rest(self) -> None:
        """Nobody is tired, but a device may be broken."""
        if BROKEN:
            msg = "an illegal memory access was encountered"
            raise RuntimeError(msg)


class Compiler:
    """Stands in for the one that compiles: a choice's ``compile`` says what becomes of it."""

    def __init__(self, sources: list[str]) -> None:
        del sources

    def compile(self, family: str, case: dict[str, Any], choice: dict[str, Any], **target: Any) -> dict[str, Any]:  # noqa: ARG002
        """Do as the choice says."""
        match choice.get("compile", "well"):
            case "aborts":
                sys.stdout.write("LLVM ERROR: Cannot select\n")
                sys.stdout.flush()
                os.abort()
            case "hangs":
                time.sleep(3600)
            case "hangs up":
                os.closerange(3, 64)
                time.sleep(3600)
            case "raises":
                msg = "Expected a power of two"
                raise ValueError(msg)
            case "eats memory":
                bytearray(1 << 34)
            case "needs too much":
                return {"resources": {"shared": 1 << 20, "num_warps": 4, "registers": 32, "stack": 0, "spills": 0}}
            case "spills":
                return {"resources": {"shared": 1024, "num_warps": 4, "registers": 255, "stack": 512, "spills": 0}}
        time.sleep(float(choice.get("seconds", 0)))
        return {"resources": {"shared": 1024, "num_warps": 4, "registers": 32, "stack": 0, "spills": 0}}


def case(number: int = 0) -> Case:
    """Make a case; all share one variant."""
    return Case(key={"size": 16 + number}, problem={"size": 16}, variant={})


def family(name: str, space: Sequence[Values], heuristic: Values, *, cases: int = 1) -> Family:
    """Make a family of sums."""
    return Family(
        name=name, operation="sum", backend="fake_kernels", sources=("fake_kernels:add",),
        cases=lambda arch: [case(number) for number in range(cases)],  # noqa: ARG005
        space=lambda of, arch: space,  # noqa: ARG005
        heuristic=lambda of, arch: heuristic,  # noqa: ARG005
        prepare=lambda of, device, fill: lambda: launch(int(of.problem["size"]), name),  # noqa: ARG005
        cost=lambda of, choice, arch: float(choice["cost"]),  # noqa: ARG005
        relatives=lambda of, arch: [replace(of, problem={**of.problem, "sign": -1})],  # noqa: ARG005
    )  # fmt: skip


HONEST: Values = {"way": "honest", "cost": 100}
PLAIN = [family("plain", [{"way": "honest", "cost": cost} for cost in (80, 90, 100, 300)], HONEST, cases=3)]
WRONG = [
    family(
        "wrong",
        [
            *({"way": way, "cost": 10} for way in ("drops the tail", "races", "reads uninitialised memory")),
            {"way": "repeats in other bits", "cost": 11}, {"way": "raises", "cost": 12}, {"way": "honest", "cost": 60},
            {"way": "forgets the sign", "cost": 20},
        ],
        HONEST,
    )
]  # fmt: skip
DEADLY = [family("deadly", [{"way": "faults", "cost": 1}, {"way": "honest", "cost": 50}], HONEST)]
BREAKING = [
    family(
        "breaking",
        [{"way": "breaks the device", "cost": 1}, *({"way": "honest", "cost": cost} for cost in (40, 50))],
        {"way": "honest", "cost": 50},
    )
]  # fmt: skip
HANGING = [family("hanging", [{"way": "hangs", "cost": 1}, {"way": "honest", "cost": 50}], HONEST)]
COMPILED = [
    family(
        "compiled",
        [
            *({"way": "honest", "cost": 5, "compile": what} for what in ("aborts", "raises", "needs too much")),
            {"way": "honest", "cost": 20, "compile": "spills"}, {"way": "honest", "cost": 40},
        ],
        HONEST,
        cases=2,
    )
]  # fmt: skip
UNCOMPILED = [family("uncompiled", [], {**HONEST, "compile": "raises"})]
NOTHING = [family("nothing", [HONEST], HONEST, cases=0)]
MANY = [family("many", [{"way": "honest", "cost": cost} for cost in range(100, 130)], HONEST, cases=4)]
CLOSE = [family("close", [{"way": "honest", "cost": 995}], {"way": "honest", "cost": 1000})]
SLOW = [family("slow", [{"way": "honest", "cost": cost, "seconds": 0.3} for cost in (*range(20, 30), 10)], HONEST)]
