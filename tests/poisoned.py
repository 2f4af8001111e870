"""Fresh memory full of NaN, between guard bands: who leaves some of it unwritten, or writes beyond it, is found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
GUARD = 4096  # bytes on either side
POISON = 255  # a byte that makes every float NaN, and every integer -1


class Poisoned(TorchDispatchMode):
    """Gives out fresh memory that is full of NaN, between guard bands of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Move what was allocated between guard bands."""
        result = func(*args, **(kwargs or {}))
        fresh = func.overloadpacket in {
            aten.empty,
            aten.empty_strided,
            aten.empty_like,
            aten.new_empty,
            aten.new_empty_strided,
        }
        return tree_map(self.moved, result) if fresh else result

    def moved(self, x: Tensor) -> Tensor:
        """Allocate a tensor again, with guards."""
        size = x.untyped_storage().nbytes()
        room = torch.full((GUARD + size + GUARD,), POISON, dtype=torch.uint8, device=x.device)
        self.rooms.append((room, size))
        inside = room[GUARD : GUARD + size].view(x.dtype) if size else room[:0].view(x.dtype)
        return inside.as_strided(x.shape, x.stride(), inside.storage_offset())

    def assert_intact(self) -> None:
        """See that nothing was written outside."""
        for room, size in self.rooms:
            bands = torch.cat([room[:GUARD], room[GUARD + size :]])
            assert bool((bands == POISON).all()), f"{size} bytes were allocated, and more were written"


@contextmanager
def poisoned() -> Iterator[Poisoned]:
    """Poison all fresh memory."""
    # A mode is one thread's: the backward pass of a GPU must not run in another.
    with torch.autograd.set_multithreading_enabled(False), Poisoned() as mode:
        yield mode
    mode.assert_intact()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether tensors are equal bit for bit, and none is NaN."""
    return len(found) == len(expected) and all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def copied(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Call, and copy the results, which the next call may overwrite."""
    return [x.clone() for x in run()]
