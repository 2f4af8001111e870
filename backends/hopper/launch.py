"""From tensors to the arguments of a kernel: what is asked, what the copy engine can address, and its descriptors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from ..flash import launch as flash
from ..flash.direct import ALIGNED, layout_described

OTHERS: Final = ("flash", "eager")  # backends that may serve what this one declines
LONGEST: Final = 2**30 - 1  # tokens: positions and their differences stay inside int32
# What is compiled: a choice that was tuned for other code does not serve.
SOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "hopper.forward": (
        "longspan.backends.hopper.forward_kernel:forward_kernel", "longspan.backends.hopper.spans:spans_kernel",
    ),
    "hopper.backward": (
        "longspan.backends.hopper.backward_kernel:backward_kernel",
        "longspan.backends.hopper.backward_wide_kernel:backward_wide_kernel",
        "longspan.backends.hopper.backward_passes:prepare_kernel",
        "longspan.backends.hopper.backward_passes:finish_kernel",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Call(flash.Call):
    """What one call of attention asks beside its queries, keys and values.

    Attributes:
        deterministic: Whether the gradient must be bitwise repeatable.
    """

    deterministic: bool = False


def padded(width: int) -> int:
    """Width of a tile's rows in shared memory: a power of two of whole 128-byte swizzle atoms."""
    return max(64, 1 << (width - 1).bit_length())


def declines_shape(name: str, x: Tensor, widest: int) -> str | None:
    """Say why the kernels do not hold the heads of a tensor, or count its tokens, or None."""
    if x.shape[3] % 8 or x.shape[3] > widest:
        return f"hopper.attention serves head dimensions in steps of 8 up to {widest}, got {x.shape[3]} of {name}"
    if x.shape[2] > LONGEST:
        return f"hopper.attention counts at most {LONGEST} tokens, got {x.shape[2]} of {name}"
    return None


def declines_address(name: str, x: Tensor, operation: str = "attention") -> str | None:
    """Say why the copy engine cannot address a tensor, or None."""
    if x.stride(3) != 1:
        return f"hopper.{operation} reads tensors whose last stride is 1, got strides {list(x.stride())} of {name}"
    if x.data_ptr() % ALIGNED:
        return f"hopper.{operation} reads tensors at addresses that are multiples of {ALIGNED} bytes; {name} is not"
    size = x.element_size()
    if any(n > 1 and (step <= 0 or step * size % ALIGNED) for n, step in zip(x.shape[:3], x.stride()[:3], strict=True)):
        return (
            f"hopper.{operation} reads tensors whose strides are multiples of {ALIGNED} bytes and repeat nothing, "
            f"got strides {list(x.stride())} of {name}"
        )
    return None


def describe(x: Tensor, rows: int, width: int) -> Any:
    """Describe a tensor to the copy engine in tiles [1, …, rows, width]: what lies outside of it reads as zeros."""
    from .gluon import TensorDescriptor, gl  # noqa: PLC0415 - Gluon is slow to import, and of no use elsewhere

    block = [*[1] * (x.ndim - 2), rows, width]
    name = str(x.dtype).removeprefix("torch.")
    dtype = getattr(gl, {"float8_e4m3fn": "float8e4nv"}.get(name, name))
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, *layout_described(x), block, layout)
