# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""The last step of a launch: what triton's launchers take for tensors and descriptors, and the C function inside them.

Triton 3.6 compiles a C launcher for each kernel, and wraps it in Python that encodes every descriptor anew, looking at
each argument for it: 16 µs, where the launch itself is 8.
"""

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, Final

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED: Final = 16  # bytes: triton compiles for addresses that this divides, or for any; the copy engine wants it
MAPS: Final = 512  # descriptors of one launch that are kept: of keys and values of as many layers as models have
STREAM: Final = 3  # its place among what the launcher takes, after the grid
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

    def longer(self, tokens: int) -> "Described":
        """Describe more tokens, whose third axis they are, in the same places."""
        return self.of([*self.shape[:2], tokens, *self.shape[3:]], self.strides)

    def at(self, address: int) -> "Described":
        """Describe the same layout elsewhere."""
        moved = object.__new__(Described)
        moved.shape, moved.strides, moved.padding = self.shape, self.strides, self.padding
        moved.base = Address(address)
        return moved


class Direct:
    """The C launcher that triton 3.6 builds for each kernel, without its Python wrappers.

    A descriptor of the copy engine is 128 bytes by value, and encoding one takes a microsecond: those of the addresses
    that were seen are kept, by the launches whose layouts they have.
    """

    def __init__(self, launch: Callable[..., None], plan: Any, layouts: list[tuple[Any, ...]]) -> None:
        """Keep the launcher and its constants."""
        run, (function, packed, *_) = plan.run, plan.head
        self.launch, self.layouts, self.constants = launch, layouts, plan.constants
        self.head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None)
        self.encode: Any = getattr(triton.runtime.driver.active.utils, "fill_tma_descriptor", None)
        self.count, self.rest = plan.count, 0
        self.spots: list[tuple[int, int, int, int]] = []
        self.runs: list[tuple[int, int, int, int]] = []

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

    def line(self, bound: Any) -> list[Any]:
        """All that the launcher takes, with zeros in the places of the stream and of addresses."""
        line, described = [*bound.grid, 0, *self.head], dict(bound.described)
        spots, runs = [], []
        for i in range(self.count):
            if i in described:
                spots.append((len(line), i, len(described[i].shape), int(described[i].padding == "nan")))
                line += (0, *described[i].shape, *described[i].strides)
            else:
                runs.append((len(line), i))
                line.append(0)
        self.spots, self.runs, self.rest = spots, joined(runs), len(line)
        return [*line, *bound.numbers, *self.constants]

    def resized(self, line: list[Any], bound: Any, tensors: tuple[Any, ...]) -> list[Any]:
        """The same of a launch of other sizes."""
        line = line.copy()
        line[:STREAM] = bound.grid
        for spot, i, axes, _ in self.spots:
            shape, strides = layout_described(tensors[i])
            line[spot + 1 : spot + 1 + 2 * axes] = shape + strides
        line[self.rest : self.rest + len(bound.numbers)] = bound.numbers
        return line

    def longer(self, line: list[Any], numbers: tuple[Any, ...], tokens: int) -> list[Any]:
        """The same of a launch of more tokens, whose third axis they are."""
        line = line.copy()
        for spot, *_ in self.spots:
            line[spot + 3] = tokens
        line[self.rest : self.rest + len(numbers)] = numbers
        return line

    def __call__(self, bound: Any, stream: int, addresses: tuple[int, ...]) -> None:
        """Launch."""
        line = bound.line.copy()
        line[STREAM] = stream
        for first, last, start, stop in self.runs:
            line[first:last] = addresses[start:stop]
        for slot, (spot, i, *_) in enumerate(self.spots):
            line[spot] = bound.maps.get((slot, addresses[i])) or self.described(bound, slot, addresses[i])
        self.launch(*line)

    def described(self, bound: Any, slot: int, address: int) -> Any:
        """Encode a descriptor, and keep it: of some addresses, for a program may ask of many."""
        if len(bound.maps) >= MAPS:
            bound.maps.clear()
        spot, _, axes, outside = self.spots[slot]
        shape, strides = bound.line[spot + 1 : spot + 1 + axes], bound.line[spot + 1 + axes : spot + 1 + 2 * axes]
        bound.maps[slot, address] = found = self.encode(address, *self.layouts[slot], shape, strides, outside)
        return found


def joined(places: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Join neighbours: where a run of addresses begins and ends in a line, and among the addresses."""
    runs: list[tuple[int, int, int, int]] = []
    for at, i in places:
        if runs and runs[-1][1] == at and runs[-1][3] == i:
            first, _, start, _ = runs.pop()
            runs.append((first, at + 1, start, i + 1))
        else:
            runs.append((at, at + 1, i, i + 1))
    return runs


def layout_described(x: Any) -> tuple[list[int], list[int]]:
    """Shape and strides of a tensor as descriptors have them.

    The stride of an axis of one element says nothing, and may be anything: also something that the engine refuses.
    """
    shape, strides = [*x.shape], [*x.stride()]
    if 1 in shape:
        for axis, size in enumerate(shape):
            if size == 1:
                strides[axis] = ALIGNED * -(-shape[-1] // ALIGNED)
    strides[-1] = 1
    return shape, strides
