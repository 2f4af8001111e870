"""The differences between the Gluon of Triton 3.6, 3.7 and 3.9, in one place: kernels import these names from here."""

from typing import Any, Final

import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "VERSION", "TensorDescriptor", "add_tile", "barrier", "fence_async_shared", "gl", "gluon", "load_tile", "mbarrier",
    "store_tile", "store_wait", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

VERSION: Final = tuple(map(int, triton.__version__.split(".")[:2]))

# Typed as anything: Gluon's own functions take an argument that only its compiler passes, and some were renamed.
LANGUAGE: Final[Any] = gl
TMA: Final[Any] = tma
load_tile = TMA.async_load if hasattr(tma, "async_load") else TMA.async_copy_global_to_shared
store_tile = TMA.async_store if hasattr(tma, "async_store") else TMA.async_copy_shared_to_global
store_wait = TMA.store_wait
barrier = LANGUAGE.barrier if hasattr(gl, "barrier") else LANGUAGE.thread_barrier


@builtin
def reduce_tile(descriptor: Any, coordinates: Any, source: Any, _semantic: Any = None) -> None:
    """Add a tile in shared memory to memory, as 3.9's own: before, only the builder that it calls is there."""
    where = _semantic._convert_to_ir_values(coordinates, require_i64=False)  # noqa: SLF001
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, where, source.handle)


add_tile = TMA.async_atomic_add if hasattr(tma, "async_atomic_add") else reduce_tile
