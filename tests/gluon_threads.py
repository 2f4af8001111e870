"""The forward kernel of `hopper` run as Python: each partition a thread, each barrier a condition.

Gluon has no interpreter. What can be wrong without one is what partitions say to each other, so its functions are
called with stand-ins for the few of Gluon's that the kernel uses: shared memory is a tensor, a product is computed
when it is waited for and not before, and a barrier that nobody passes ends the run instead of hanging it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PATIENCE = 5.0  # seconds at a barrier


class Memory:
    """A piece of shared memory, or a described tensor."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype, self.layout = data, data.dtype, None

    def index(self, i: Any) -> "Memory":
        """One of the pieces along the first axis."""
        return Memory(self.data[int(i)])

    def reshape(self, shape: list[int]) -> "Memory":
        """The same memory, seen in another shape."""
        return Memory(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Memory":
        """The same memory, its axes in another order."""
        return Memory(self.data.permute(order))

    def slice(self, start: int, length: int) -> "Memory":
        """Some rows."""
        return Memory(self.data[start : start + length])

    def load(self, _layout: Any) -> Tensor:
        """Read."""
        return self.data.clone()

    def store(self, x: Tensor) -> None:
        """Write."""
        self.data.copy_(x)


class Barrier:
    """Passed when so many have arrived and all bytes that are expected are there."""

    def __init__(self) -> None:
        self.turn, self.met, self.count, self.bytes = threading.Condition(), 0, 0, 0
        self.passed = 0

    def add(self, arrivals: int, size: int) -> None:
        """Arrive, and expect bytes, or get them where the size is negative."""
        with self.turn:
            self.met, self.bytes = self.met + arrivals, self.bytes + size
            assert self.met <= self.count, "more arrivals than the barrier counts"
            if self.met == self.count and self.bytes == 0:
                self.passed, self.met = self.passed + 1, 0
                self.turn.notify_all()

    def wait(self, parity: Any) -> None:
        """Wait for the turn of this parity to be over."""
        with self.turn:
            assert self.turn.wait_for(lambda: self.passed & 1 != int(parity), PATIENCE), "nobody passes a barrier"


class Pointer:
    """An address in a tensor, or a tensor of them."""

    def __init__(self, data: Tensor, at: Any = 0) -> None:
        self.data, self.at = data, at
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.data, self.at + more)


class Product:
    """A product that the tensor cores have yet to compute."""

    def __init__(self, a: Any, b: Memory, acc: Any) -> None:
        self.parts = (a, b, acc)

    def result(self) -> Tensor:
        """Compute it, from what memory holds now."""
        a, b, acc = self.parts
        return (a.data if isinstance(a, Memory) else a).float() @ b.data.float() + acc


def load(at: Pointer, mask: Any = True, other: Any = 0) -> Any:
    """Read numbers; where the mask is false, ``other``."""
    if isinstance(at.at, int):
        return at.data.view(-1)[at.at].item() if mask else other
    shown = torch.as_tensor(mask)
    return torch.where(shown, at.data.view(-1)[torch.where(shown, at.at, 0)], other)


def store(at: Pointer, x: Tensor, mask: Tensor) -> None:
    """Write numbers where the mask is true."""
    where = at.at.expand(mask.shape)[mask]
    at.data.view(-1)[where] = x.expand(mask.shape)[mask].to(at.data.dtype)


def box(source: Tensor, coordinates: list[int], shape: tuple[int, ...]) -> tuple[Tensor, tuple[slice, ...]]:
    """The part of a tensor that a tile covers, and where in the tile it lies."""
    ranges = [
        slice(max(c, 0), max(min(c + n, size), c, 0))
        for c, n, size in zip(coordinates, shape, source.shape, strict=True)
    ]
    return source[tuple(ranges)], tuple(
        slice(r.start - c, r.stop - c) for r, c in zip(ranges, coordinates, strict=True)
    )


def load_tile(source: Memory, coordinates: list[int], barrier: Barrier, tile: Memory) -> None:
    """Copy a tile in, zeros outside; its bytes arrive."""
    part, where = box(source.data, [int(c) for c in coordinates], tuple(tile.data.shape))
    tile.data.zero_()
    tile.data[where] = part
    barrier.add(0, -tile.data.numel() * 2)


def store_tile(target: Memory, coordinates: list[int], tile: Memory) -> None:
    """Copy a tile out, nothing outside."""
    part, where = box(target.data, [int(c) for c in coordinates], tuple(tile.data.shape))
    part.copy_(tile.data[where])


class Machine:
    """One launch: which program runs, and what its partitions found wrong."""

    def __init__(self, programs: int) -> None:
        self.programs, self.program, self.lock, self.wrong = programs, 0, threading.Lock(), list[BaseException]()

    def allocate(self, dtype: Any, shape: list[int], _layout: Any) -> Any:
        """Make shared memory, full of what nobody wrote; of int64, barriers."""
        if dtype is torch.int64:
            return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__, **vars(Barrier()))
        return Memory(torch.full(shape, 77, dtype=dtype))

    def atomic_add(self, at: Pointer, more: int, sem: str) -> int:  # noqa: ARG002
        """Add, and say what was there."""
        with self.lock:
            old = int(at.data[0])
            at.data[0] += more
            return old

    def specialize(self, partitions: list[tuple[Any, tuple[Any, ...]]], *_: Any) -> None:
        """Run each partition in a thread."""

        def run(function: Any, args: tuple[Any, ...]) -> None:
            try:
                function(*args)
            except BaseException as error:  # noqa: BLE001 - said by whoever started it
                self.wrong.append(error)

        threads = [threading.Thread(target=run, args=one, daemon=True) for one in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if self.wrong or any(thread.is_alive() for thread in threads):
            raise self.wrong[0] if self.wrong else TimeoutError


def language(machine: Machine) -> SimpleNamespace:
    """Stand-ins for the functions of Gluon's language."""

    def pair(function: Any) -> Any:
        return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return SimpleNamespace(
        constexpr=lambda x: x, static_range=range, float32=torch.float32, int32=torch.int32, int64=torch.int64,
        program_id=lambda _: machine.program, num_programs=lambda _: machine.programs,
        arange=lambda a, b, _: torch.arange(a, b), zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
        full=lambda shape, x, dtype, _: torch.full(shape, x, dtype=dtype), where=torch.where, abs=torch.abs,
        maximum=pair(torch.maximum), minimum=pair(torch.minimum), max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis) if x.ndim > 1 else int(x.sum()), exp2=lambda x: torch.exp2(torch.as_tensor(x)),
        log2=torch.log2, reshape=torch.reshape, convert_layout=lambda x, _, assert_trivial=False: x,  # noqa: ARG005
        load=load, store=store, cast=lambda x, _: x, atomic_add=machine.atomic_add,
        allocate_shared_memory=machine.allocate, warp_specialize=machine.specialize,
        SliceLayout=nothing, BlockedLayout=nothing, DotOperandLayout=nothing, SwizzledSharedLayout=nothing,
    )  # fmt: skip


@contextmanager
def interpreted(kernels: Any, tiles: Any, machine: Machine) -> Iterator[Any]:
    """Put stand-ins in place of Gluon in the modules of the kernel; yields the kernel as a Python function."""

    def each(barrier: Any) -> Any:
        return barrier.index(0) if hasattr(barrier, "index") else barrier

    def wait_for(_outstanding: int, deps: tuple[Product, ...]) -> Any:
        results = tuple(x.result() for x in deps)
        return results[0] if len(results) == 1 else results

    barriers = SimpleNamespace(
        MBarrierLayout=lambda: None, init=lambda x, count: setattr(each(x), "count", count),
        wait=lambda x, parity: each(x).wait(parity), arrive=lambda x, count: each(x).add(count, 0),
        expect=lambda x, size: each(x).add(1, size),
    )  # fmt: skip
    stand_ins = {
        "gl": language(machine), "mbarrier": barriers, "load_tile": load_tile, "store_tile": store_tile,
        "store_wait": lambda _: None, "fence_async_shared": lambda: None, "meet": lambda: None, "wait_for": wait_for,
        "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product(a, b, acc if use_acc else 0.0),  # noqa: ARG005
        "LOG2_E": 1.4426950408889634, "LN_2": 0.6931471805599453, "LOWEST": torch.finfo(torch.float32).min,
    }  # fmt: skip
    plain = {name: x.fn for name, x in vars(tiles).items() if hasattr(x, "fn")}
    own = {name: x.fn for name, x in vars(kernels).items() if hasattr(x, "fn") and name != "forward_kernel"}
    with patch.multiple(tiles, **plain), patch.multiple(kernels, **{**own, **stand_ins}):
        yield kernels.forward_kernel.fn
