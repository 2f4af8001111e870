"""How long a launch takes: on a GPU by events or graphs, elsewhere by the wall's clock.

A clock is handed to the measuring worker by its import string, so that tests race kernels that are no kernels through
the same code.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

Launch = Callable[[], Any]
SHORT: Final = 300e-6  # seconds: what is shorter is timed in a graph, without the host
GRAPH: Final = 1e-3  # seconds that one graph takes at least
CACHES: Final = 3  # times the last-level cache that the arguments of short kernels fill
COPIES: Final = 32  # at most
AHEAD: Final = 3_000_000  # cycles that the device sleeps while the host queues behind them what a launch consists of
IDLE: Final = 0.02  # seconds between two finalists: the card's clocks recover from the neighbour


class Clock(Protocol):
    """Times launches on one device."""

    device: str

    def describe(self) -> dict[str, Any] | None:
        """Return the fields of the `Device`, with its ``uuid``; None where kernels are only interpreted."""
        ...

    def copies(self, prepare: Callable[[], Launch]) -> list[Launch]:
        """Prepare a launch often enough that caches hold no arguments from one to the next."""
        ...

    def meter(self, calls: Sequence[Launch]) -> Callable[[int], list[float]]:
        """Return what launches so many times, and returns the seconds of each."""
        ...

    def rest(self) -> None:
        """Pause."""
        ...


class Wall:
    """Times on a CPU, where kernels are interpreted: for tests, and to see that something runs at all."""

    device = "cpu"

    def describe(self) -> dict[str, Any] | None:
        """There is no device to describe."""
        return None

    def copies(self, prepare: Callable[[], Launch]) -> list[Launch]:
        """One will do."""
        return [prepare()]

    def meter(self, calls: Sequence[Launch]) -> Callable[[int], list[float]]:
        """Time calls one by one."""

        def measure(launches: int) -> list[float]:
            times = []
            for turn in range(launches):
                begin = time.perf_counter()
                calls[turn % len(calls)]()
                times.append(time.perf_counter() - begin)
            return times

        return measure

    def rest(self) -> None:
        """Nothing has to recover."""


class Cuda:
    """Times on a GPU, NVIDIA's or AMD's, that PyTorch calls cuda."""

    def __init__(self, index: int = 0) -> None:
        import torch  # noqa: PLC0415 - a worker alone measures

        if not torch.cuda.is_available():
            msg = f"measuring needs a GPU that PyTorch can use, and torch {torch.__version__} finds none here"
            raise RuntimeError(msg)
        torch.cuda.set_device(index)
        self.torch, self.device = torch, f"cuda:{index}"

    def describe(self) -> dict[str, Any] | None:
        """Describe the device, and name the card so that nobody else measures on it."""
        from dataclasses import asdict  # noqa: PLC0415

        from .device import current  # noqa: PLC0415

        seen: Any = self.torch.cuda.get_device_properties(self.device)
        found = current()
        assert found is not None  # noqa: S101 - there was a GPU when this began
        return {**asdict(found), "uuid": str(getattr(seen, "uuid", self.device))}

    def copies(self, prepare: Callable[[], Launch]) -> list[Launch]:
        """Prepare as many launches as overflow the last-level cache."""
        before = self.torch.cuda.memory_allocated()
        first = prepare()
        first()
        moved = max(1, self.torch.cuda.memory_allocated() - before)
        cache = self.torch.cuda.get_device_properties(self.device).L2_cache_size
        return [first, *(prepare() for _ in range(min(COPIES, math.ceil(CACHES * cache / moved)) - 1))]

    def meter(self, calls: Sequence[Launch]) -> Callable[[int], list[float]]:
        """Time by events, each launch queued before the device gets to it; short kernels in a graph."""
        calls[0]()  # compiled and loaded
        rough = min(self.event(calls[0]), self.event(calls[-1]))
        if rough < SHORT:
            try:
                return self.graph(calls, rough)
            except RuntimeError:  # what waits for the host cannot be captured
                self.torch.cuda.synchronize()
        return lambda launches: [self.event(calls[turn % len(calls)]) for turn in range(launches)]

    def event(self, call: Launch) -> float:
        """Seconds of one launch."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda._sleep(AHEAD)  # noqa: SLF001 - no public name; the host must be ahead of the device
        begin.record()
        call()
        end.record()
        self.torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def graph(self, calls: Sequence[Launch], rough: float) -> Callable[[int], list[float]]:
        """Capture every call, over and over; seconds of one of them, replay by replay."""
        torch = self.torch
        cycles = max(1, math.ceil(GRAPH / (rough * len(calls))))
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            for call in calls:
                call()
            side.synchronize()
            graph.capture_begin()  # not torch.cuda.graph, which collects garbage for a tenth of a second first
            try:
                for _ in range(cycles):
                    for call in calls:
                        call()
            finally:
                graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
        return lambda launches: [self.event(graph.replay) / (cycles * len(calls)) for _ in range(launches)]

    def rest(self) -> None:
        """Let the card idle for a moment."""
        self.torch.cuda.synchronize()
        time.sleep(IDLE)
