"""Measuring so that a figure can be compared with its neighbours: shuffled, rested, repeated, out of the cache.

A power-capped card runs a kernel up to 12 % slower after a hot neighbour than after a cool one. So all contestants of
a cell are made ready first; then come rounds, each in a new order, with an idle gap before each measurement; a figure
is the median of the rounds, with their spread beside it. What takes less than 100 µs is captured in a CUDA graph over
copies of the inputs that fill the last-level cache three times, because launching it would cost more than running it.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from ask import Call

ROUNDS: Final = 5
IDLE: Final = 0.03  # seconds before each measurement
SHORT: Final = 100e-6  # seconds below which a launch is captured in a graph
TURN: Final = 0.015  # seconds of launches that one measurement is made of
ONCE: Final = 0.2  # seconds above which one launch is a measurement
STRETCHES: Final = 20  # of calls that are timed on the host
STRETCH: Final = 50  # calls; some hundred launches wait in a stream before the host has to
CACHES: Final = 3  # times the last-level cache that inputs, or what clears it, fill


@dataclass(frozen=True)
class Reading:
    """What one contestant took.

    Attributes:
        seconds: Median of the rounds.
        spread: Slowest less fastest round, by the median.
        rounds: How many.
        timed: By events around launches, by events around a graph of them, or on the host alone.
        eager: Seconds a launch when launched one by one without a pause, host time included; where a graph was timed.
    """

    seconds: float
    spread: float
    rounds: int
    timed: Literal["events", "graph", "host"]
    eager: float | None = None


def summary(times: Sequence[float], timed: Literal["events", "graph", "host"], eager: float | None = None) -> Reading:
    """Sum the rounds up."""
    middle = statistics.median(times)
    return Reading(middle, (max(times) - min(times)) / middle, len(times), timed, eager)


def rounds(
    measures: dict[str, Callable[[], float]], count: int, draw: random.Random, rest: Callable[[], None]
) -> dict[str, list[float]]:
    """Measure everyone once a round, in a new order each time, rested."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(count):
        order = list(measures)
        draw.shuffle(order)
        for name in order:
            rest()
            times[name].append(measures[name]())
    return times


def race(
    ready: dict[str, Call], enter: Callable[[str, int], Call], moved: float, *, count: int = ROUNDS, seed: int = 0
) -> dict[str, Reading]:
    """Race the contestants of one cell.

    Args:
        ready: Calls on the first copy of the inputs, each made once before.
        enter: From a contestant and the number of a copy of the inputs to a call on it.
        moved: Bytes that one call has to move.
        count: Rounds.
        seed: Of the orders.
    """
    cache = torch.cuda.get_device_properties().L2_cache_size or 64 * 2**20
    clear = torch.empty(CACHES * cache // 4, dtype=torch.int32, device="cuda")
    rough = {name: estimate(call, clear) for name, call in ready.items()}
    measures = {name: repeated(call, clear, rough[name]) for name, call in ready.items()}
    eager: dict[str, float] = {}
    if rough and min(rough.values()) < SHORT:
        copies = max(1, math.ceil(CACHES * cache / moved))
        for name, call in ready.items():
            calls = [call, *(enter(name, copy) for copy in range(1, copies))]
            try:
                measures[name], eager[name] = captured(calls, rough[name]), launched(calls)
            except RuntimeError:  # what waits for the host cannot be captured, and the reading says how it was timed
                torch.cuda.synchronize()
    times = rounds(measures, count, random.Random(seed), rest)  # noqa: S311 - an order is no secret
    return {
        name: summary(spent, "graph" if name in eager else "events", eager.get(name)) for name, spent in times.items()
    }


def race_on_host(ready: dict[str, Call], *, count: int = ROUNDS, seed: int = 0) -> dict[str, Reading]:
    """Race what the host does for a call: nobody waits for the card, which does next to nothing."""
    measures = {name: lambda call=call: returned(call) for name, call in ready.items()}
    times = rounds(measures, count, random.Random(seed), rest)  # noqa: S311 - an order is no secret
    return {name: summary(spent, "host") for name, spent in times.items()}


def returned(call: Call) -> float:
    """Return the seconds until a call returns: the median of stretches short enough for the card's queue."""
    stretches = []
    for _ in range(STRETCHES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(STRETCH):
            call()
        stretches.append((time.perf_counter() - begin) / STRETCH)
    torch.cuda.synchronize()
    return statistics.median(stretches)


def rest() -> None:
    """Let the card's clocks recover from the neighbour."""
    torch.cuda.synchronize()
    time.sleep(IDLE)


def estimate(call: Call, clear: torch.Tensor) -> float:
    """Return about how many seconds a call takes."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    return once if once > ONCE else events(call, clear, 3)


def repeated(call: Call, clear: torch.Tensor, rough: float) -> Callable[[], float]:
    """Return a measurement by events, of as many launches as a turn holds."""
    reps = max(1, min(20, round(TURN / rough)))
    return lambda: events(call, clear, reps)


def events(call: Call, clear: torch.Tensor, reps: int) -> float:
    """Return the median seconds of a launch, the cache cleared before each."""
    pairs = []
    if reps > 1:
        call()  # the clocks fell while idle
    for _ in range(reps):
        clear.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e-3


def captured(calls: Sequence[Call], rough: float) -> Callable[[], float]:
    """Capture the calls, over and over, and return a measurement of one of them."""
    cycles = max(1, round(TURN / 5 / (rough * len(calls))))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(cycles):
            for call in calls:
                call()

    def measure() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (cycles * len(calls))

    return measure


def launched(calls: Sequence[Call]) -> float:
    """Return the seconds of one launch among many, one after the other."""
    cycles = max(1, 60 // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(cycles):
        for call in calls:
            call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / (cycles * len(calls))


def peak(call: Callable[[], Sequence[torch.Tensor]]) -> int:
    """Return the bytes that a call allocates at its peak beyond what it was given and what it returns."""
    call()  # libraries allocate workspaces once
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return most - sum(kept.values())
