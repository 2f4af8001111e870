# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""The last step of a launch: what triton's launchers take for tensors and descriptors, and the C function inside them.

Triton 3.6 compiles a C launcher for each kernel, and wraps it in Python that encodes every descriptor anew, looking at
each argument for it: 16 µs, where the launch itself is 8.
"""

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, Final

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED: Final = 16  # bytes: triton compiles for addresses that this divides, or for any; the copy engine wants it
VERSION: Final = "3.6."  # of triton, whose C launcher is called without the function around it
# How triton numbers element types of descriptors on the device, and how the driver does.
TENSOR_MAP_TYPES: Final = {8: 10, 9: 8, 10: 9}


class Address(int):
    """An address that launchers take for a tensor."""

    def data_ptr(self) -> int:
        """Be one's own address."""
        return int(self)


class Described:
    """A `TensorDescriptor` of some address, which launchers read and nobody checks again."""

    round_f32_to_tf32 = False

    def __init__(self, like: TensorDescriptor) -> None:
        """Take the layout of another."""
        self.shape, self.strides, self.padding = list(like.shape), list(like.strides), like.padding
        self.base = Address(0)

    def of(self, shape: list[int], strides: list[int]) -> "Described":
        """Describe another layout."""
        other = object.__new__(Described)
        other.shape, other.strides, other.padding, other.base = shape, strides, self.padding, self.base
        return other

    def at(self, address: int) -> "Described":
        """Describe the same layout elsewhere."""
        moved = object.__new__(Described)
        moved.shape, moved.strides, moved.padding = self.shape, self.strides, self.padding
        moved.base = Address(address)
        return moved


class Direct:
    """The C launcher that triton 3.6 builds for each kernel, without its Python wrappers.

    A descriptor of the copy engine is 128 bytes by value: encoding it takes a microsecond, so that of the address that
    was last seen is kept, slot by slot.
    """

    def __init__(self, launch: Callable[..., None], plan: Any, layouts: list[tuple[Any, ...]]) -> None:
        """Keep the launcher and its constants."""
        run, (function, packed, *_) = plan.run, plan.head
        self.launch, self.layouts = launch, layouts
        self.head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None)
        self.encode: Any = getattr(triton.runtime.driver.active.utils, "fill_tma_descriptor", None)

    @classmethod
    def of(cls, plan: Any) -> "Direct | None":
        """Find the C function under the wrappers of a kernel, or None where it is not as expected."""
        run = plan.run
        if not triton.__version__.startswith(VERSION) or type(run).__name__ != "CudaLauncher":
            return None
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        launch, layouts = run.launch, []
        if plan.described:
            names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
            inside: dict[str, Any] = dict(zip(names, getattr(launch, "__closure__", None) or (), strict=False))
            found = getattr(plan.compiled.metadata, "tensordesc_meta", None) or ()
            if "launcher" not in inside or len(found) != len(plan.described) or not all(found):
                return None
            launch = inside["launcher"].cell_contents
            for x in found:
                if x["fp4_padded"]:
                    return None
                element = TENSOR_MAP_TYPES.get(x["elem_type"], x["elem_type"])
                layouts.append((x["swizzle"], x["elem_size"], element, x["block_size"]))
        return cls(launch, plan, layouts) if isinstance(launch, BuiltinFunctionType) else None

    def __call__(self, bound: Any, stream: int, addresses: tuple[int, ...]) -> None:
        """Launch."""
        args: Any = addresses
        if self.layouts:
            args, grown, maps = list(addresses), 0, bound.maps
            for (i, like), layout in zip(bound.described, self.layouts, strict=True):
                address, seen = addresses[i], maps.get(i)
                if seen is None or seen[0] != address:
                    outside = int(like.padding == "nan")
                    maps[i] = seen = (address, self.encode(address, *layout, like.shape, like.strides, outside))
                args[i + grown : i + grown + 1] = (seen[1], *like.shape, *like.strides)
                grown += 2 * len(like.shape)
        self.launch(*bound.grid, stream, *self.head, *args, *bound.rest)


def layout_described(x: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of four axes, as descriptors have them.

    The stride of an axis of one element says nothing, and may be anything: also something that the engine refuses.
    """
    b, heads, tokens, d = shape = [*x.shape]
    strides = [*x.stride()]
    row = ALIGNED * -(-d // ALIGNED)
    if b == 1:
        strides[0] = row
    if heads == 1:
        strides[1] = row
    if tokens == 1:
        strides[2] = row
    strides[3] = 1
    return shape, strides
