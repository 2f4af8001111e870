"""The clock of a GPU, on a stand-in for PyTorch's that counts what is asked of it; and the clock on the wall."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longspan.autotune.clock import CACHES, COPIES, Cuda, Wall


class Card:
    """A card on which every launch takes ``launch`` seconds, a graph as long as what was captured in it."""

    def __init__(self, launch: float, *, captures: bool = True) -> None:
        self.launch, self.captures = launch, captures
        self.now, self.memory = 0.0, 0
        self.capturing: list[float] | None = None

    def run(self) -> None:
        """Launch a kernel."""
        if self.capturing is None:
            self.now += self.launch
        else:
            self.capturing.append(self.launch)

    def module(self) -> Any:
        """Stand for torch."""
        card = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = card.now

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def capture_begin(self) -> None:
                if not card.captures:
                    message = "operation not permitted when stream is capturing"
                    raise RuntimeError(message)
                card.capturing = self.held = []

            def capture_end(self) -> None:
                card.capturing = None

            def replay(self) -> None:
                card.now += sum(self.held)

        def sleep(cycles: int) -> None:
            card.now += cycles * 1e-9

        cuda = SimpleNamespace(
            Event=Event, CUDAGraph=Graph, Stream=lambda: SimpleNamespace(synchronize=lambda: None), stream=nullcontext,
            synchronize=lambda: None, _sleep=sleep, memory_allocated=lambda: card.memory,
            get_device_properties=lambda _: SimpleNamespace(L2_cache_size=1000),
        )  # fmt: skip
        return SimpleNamespace(cuda=cuda)


def clock(card: Card) -> Cuda:
    """Make the clock of a card that is not there."""
    made = object.__new__(Cuda)
    made.torch, made.device = card.module(), "cuda:0"
    return made


@pytest.mark.parametrize("seconds", [1e-5, 2.9e-4, 3.1e-4, 5e-3])
@pytest.mark.parametrize("count", [1, 7])
def test_a_launch_takes_what_it_takes_in_a_graph_or_alone(seconds: float, count: int) -> None:
    card = Card(seconds)
    times = clock(card).meter([card.run] * count)(5)
    assert times == pytest.approx([seconds] * 5)


def test_short_launches_that_cannot_be_captured_are_timed_by_events() -> None:
    card = Card(1e-5, captures=False)
    assert clock(card).meter([card.run])(3) == pytest.approx([1e-5] * 3)


@pytest.mark.parametrize(("size", "expected"), [(10, COPIES), (1000, CACHES), (1400, 3), (9000, 1)])
def test_small_arguments_are_prepared_often_enough_to_overflow_the_cache(size: int, expected: int) -> None:
    card = Card(1e-3)

    def prepare() -> Callable[[], None]:
        card.memory += size
        return card.run

    assert len(clock(card).copies(prepare)) == expected


def test_without_a_gpu_the_clock_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="needs a GPU that PyTorch can use"):
        Cuda()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_described_and_times_a_copy() -> None:
    here = Cuda()
    found = here.describe()
    assert found is not None
    assert found["multiprocessors"] > 0
    x = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    times = here.meter([lambda: y.copy_(x)])(5)
    assert all(1e-5 < one < 1e-1 for one in times)


def test_the_wall_clock_times_calls_in_turn() -> None:
    calls: list[int] = []
    measure = Wall().meter([lambda: calls.append(0), lambda: calls.append(1)])
    assert all(one > 0 for one in measure(4))
    assert calls == [0, 1, 0, 1]
