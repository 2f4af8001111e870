"""Time and peak memory of one layer's rotation and attention, for prefill and for decode.

Lengths double up to the context. A length that would take longer than there is time, or more memory than there is,
is not run: what it takes is then extrapolated from the longest that was, and marked so.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import AttentionState

from .config import Plan
from .memory import available, peak

SHORTEST: Final = 256  # tokens that doubling starts from
REPEAT: Final = 0.3  # seconds of repetition that a median is taken over
ROOM: Final = 0.7  # of the memory at hand that may be used


class Point(NamedTuple):
    """What one length took: seconds, and bytes of inputs, results and all between."""

    length: int
    seconds: float
    peak_bytes: int | None


class Run(NamedTuple):
    """Tensors of one prefill: inputs, what they were turned into, and the result."""

    q: Tensor
    k: Tensor
    v: Tensor
    turned_q: Tensor
    turned_k: Tensor
    state: AttentionState


@dataclass
class Curve:
    """What was measured of one layer, length by length; ``growth`` is the power of the length that time follows."""

    context: int
    growth: int
    points: list[Point] = field(default_factory=list)
    stopped: str | None = None

    @property
    def extrapolated(self) -> bool:
        """Whether the context itself was not run."""
        return bool(self.points) and self.points[-1].length < self.context

    def seconds(self) -> float | None:
        """Seconds at the context: measured, or extrapolated by the growth."""
        return None if not self.points else self.points[-1].seconds * self.ratio() ** self.growth

    def peak_bytes(self) -> float | None:
        """Bytes at the context: measured, or extrapolated by the growth of the last doubling."""
        if not self.points or self.points[-1].peak_bytes is None:
            return None
        return self.points[-1].peak_bytes * self.ratio() ** memory_growth(self.points)

    def ratio(self) -> float:
        """How many times longer the context is than what was run."""
        return self.context / self.points[-1].length


def memory_growth(points: list[Point]) -> int:
    """Power of the length that memory follows: 2 where the last doubling more than tripled it."""
    if len(points) < 2:
        return 2
    (_, _, before), (_, _, after) = points[-2:]
    return 2 if before and after and after > 3 * before else 1


def lengths(context: int) -> list[int]:
    """Halve the context down to `SHORTEST`, shortest first."""
    halves = [context]
    while halves[-1] // 2 >= SHORTEST:
        halves.append(halves[-1] // 2)
    return halves[::-1]


def draw(plan: Plan, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values of a layer; weights are not at hand, and time does not depend on them."""
    layer, source = plan.layer, torch.Generator(plan.device).manual_seed(0)
    shapes = (
        (layer.heads, queries, layer.head_dim),
        (layer.groups, keys, layer.head_dim),
        (layer.groups, keys, layer.value_dim),
    )
    q, k, v = (torch.randn(1, *shape, generator=source, dtype=plan.dtype, device=plan.device) for shape in shapes)
    return q, k, v


def prefill(backend: Backend, plan: Plan, context: int, seconds: float) -> tuple[Curve, Run | None]:
    """Turn and attend to whole prompts of growing length; the last run that was at the context is returned."""
    end, last = time.monotonic() + seconds, None

    def one(length: int) -> Point:
        nonlocal last
        last = None  # of the length before: not to be held while the next is made
        q, k, v = draw(plan, length, length)
        position = torch.arange(length, device=plan.device)

        def call() -> Run:
            q2, k2 = turn(backend, plan, q, k, position)
            return Run(q, k, v, q2, k2, backend.attention(q2, k2, v, **plan.options()))

        point, last = measured(call, plan.device, length, plan.bytes_of(length, length))
        return point

    need = lambda length: 4 * plan.bytes_of(length, length)  # noqa: E731 - results, and copies in float32
    curve = grow(plan, context, one, need, end, growth=1 if plan.width is not None and plan.width < context else 2)
    return curve, None if curve.extrapolated else last


def decode(backend: Backend, plan: Plan, context: int, seconds: float) -> Curve:
    """Turn one new token and attend from it to a cache of growing length."""
    end = time.monotonic() + seconds

    def one(length: int) -> Point:
        q, k, v = draw(plan, 1, length)
        position = torch.tensor([length - 1], device=plan.device)

        def call() -> AttentionState:
            new_q, _ = turn(backend, plan, q, k[:, :, -1:], position)
            return backend.attention(new_q, k, v, **plan.options())

        return measured(call, plan.device, length, plan.bytes_of(1, length))[0]

    return grow(plan, context, one, lambda length: 4 * plan.bytes_of(1, length), end, growth=1)


def turn(backend: Backend, plan: Plan, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate, where the layer rotates."""
    if plan.rotation is None:
        return q, k
    return backend.rotate_qk(q, k, position, plan.rotation, pairing=plan.layer.pairing)


def grow(
    plan: Plan, context: int, one: Callable[[int], Point], need: Callable[[int], int], end: float, *, growth: int
) -> Curve:
    """Measure longer and longer, as long as the next length fits into the time and the memory left."""
    curve = Curve(context, growth)
    for length in lengths(context):
        room, told = available(plan.device), curve.points[-1] if curve.points else None
        wanted, expected = need(length), 0.0
        if told is not None:
            # Below the width of a window even its layers are quadratic.
            power = 1 if growth == 1 and (plan.width is None or told.length > plan.width) else 2
            expected = told.seconds * (length / told.length) ** power
            wanted = max(wanted, int((told.peak_bytes or 0) * (length / told.length) ** memory_growth(curve.points)))
        if room is not None and wanted > ROOM * room:
            curve.stopped = f"{length} tokens would take more memory than the device has left"
        elif told is not None and time.monotonic() + expected > end:
            curve.stopped = f"{length} tokens would take longer than the time given by --seconds"
        if curve.stopped is not None:
            break
        try:
            with torch.no_grad():
                if not curve.points:  # threads start, kernels load: not what is to be measured
                    one(length)
                curve.points.append(one(length))
        except (torch.OutOfMemoryError, MemoryError):
            curve.stopped = f"{length} tokens ran out of memory"
            break
    return curve


def measured(call: Callable[[], Any], device: torch.device, length: int, inputs: int) -> tuple[Point, Any]:
    """Measure one call: its memory in a run of its own, its time as the median of several where it is short."""
    if device.type == "cuda":
        call()  # kernels compile, and the allocator fills its pool
    first = clock(lambda: peak(call, device), device)
    (result, extra), taken = first
    total, times = 0.0, []
    while total < REPEAT and taken < 3 * REPEAT:
        _, again = clock(call, device)
        times.append(again)
        total += again
    return Point(length, statistics.median(times or [taken]), None if extra is None else inputs + extra), result


def clock(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return a call's result and the seconds it took, work on a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started
