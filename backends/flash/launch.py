"""From tensors to the arguments of a kernel: the choice, the descriptors, the strides and the flags."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final, Protocol

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .choices import Choice, Kernel, Key, brief, choose
from .kin import Sizes
from .plan import ALIGNED, layout_described
from .reach import Lowered, all_seen, each_sees
from .tiles import split

LOG2_E: Final = math.log2(math.e)
# TRITON_INTERPRET=1 counts when kernels are defined, so that they, and no variable, say whether it did.
INTERPRETED: Final = not isinstance(split, triton.runtime.JITFunction)


class Again(Protocol):
    """How to repeat a launch."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, alibi: Tensor | None,
        sequences: Tensor | None = ..., rows: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Launch on these; ``(out, lse)``, or None where it cannot be repeated on them."""

    def resized(self, sizes: Sizes, interval: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> "Again":
        """Take the code to a problem that differs in sizes alone; see `growing.form`."""
        ...

    def longer(self, n: int, interval: tuple[int, ...]) -> "Again | None":
        """Take the code to n keys in the same places; None where that is not all that code depends on."""
        ...


@dataclass(frozen=True)
class Call:
    """What one call of attention asks beside its queries, keys and values.

    Attributes:
        sink: One score per head, [h] or [b, h], or None.
        alibi: One slope per head, [h] or [b, h], or None.
        rows: See `Lowered`, as for the next two.
        sequences: See `Lowered`.
        interval: The integers of `Lowered`: low, high, stop, position, keep.
        scale: Multiplies ``q · k``.
        softcap: Cap of the scores, or None.
        out_dtype: Dtype of ``out``.
        wanted: Whether whoever launches is to say how to do it `again`.
    """

    sink: Tensor | None
    alibi: Tensor | None
    rows: Tensor | None
    sequences: Tensor | None
    interval: tuple[int, int, int, int, int]
    scale: float
    softcap: float | None
    out_dtype: torch.dtype
    wanted: bool = False

    @property
    def negative(self) -> bool:
        """Whether the kernel turns the sign of ``q · k`` so that the scale it is given is not negative."""
        return self.scale < 0 and self.softcap is None

    @property
    def factors(self) -> tuple[float, float, float]:
        """``scale``, ``inner`` and ``outer`` of `tiles.base_two`."""
        if self.softcap is None:
            return abs(self.scale) * LOG2_E, 0.0, 0.0
        return self.scale * LOG2_E, 2 * LOG2_E * self.scale / self.softcap, self.softcap * LOG2_E

    @property
    def again(self) -> Again | None:
        """How to repeat the launch on tensors that differ in nothing but their addresses; None if nobody said."""
        return self.__dict__.get("kept")

    def keep(self, again: Again) -> None:
        """Say how to repeat the launch; to be called by whoever launched."""
        self.__dict__["kept"] = again

    @cached_property
    def lowered(self) -> Lowered:
        """The mask."""
        return Lowered(self.rows, self.sequences, *self.interval)


def quiet() -> AbstractContextManager[Any]:
    """Let interpreted kernels compute with infinities and NaN as a GPU does: without warnings."""
    if not INTERPRETED:
        return nullcontext()
    import numpy as np  # noqa: PLC0415 - only the interpreter needs it

    return np.errstate(all="ignore")


def architecture() -> str:
    """Name of the current device, for which kernels are compiled."""
    if INTERPRETED:
        return "interpreter"
    driver: Any = triton.runtime.driver.active
    return architecture_of(driver, driver.get_current_device())


@cache
def architecture_of(driver: Any, device: int) -> str:
    """Name of the device, which is the current one."""
    del device
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def padded(width: int) -> int:
    """Width of a tile's rows in registers: a power of two that a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def describable(x: Tensor) -> bool:
    """Whether the copy engine can address a tensor: aligned, no axis repeated, nothing empty."""
    if x.data_ptr() % ALIGNED or x.numel() == 0:
        return False
    (b, h, n, _), (of_b, of_h, of_n, _) = x.shape, x.stride()
    of_b, of_h, of_n = (ALIGNED if b == 1 else of_b), (ALIGNED if h == 1 else of_h), (ALIGNED if n == 1 else of_n)
    return of_b > 0 and of_h > 0 and of_n > 0 and (of_b | of_h | of_n) * x.element_size() % ALIGNED == 0


def select(kernel: Kernel, call: Call, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Choice:
    """Choose how a kernel is launched on these tensors."""
    m, n = q.shape[2], k.shape[2]
    everything = call.rows is None and call.sequences is None and each_sees(m, n, *call.interval)
    key = Key(
        kernel=kernel, architecture=architecture(), width=padded(max(q.shape[3], v.shape[3])),
        itemsize=q.element_size(), masked=not everything, descriptors=all(map(describable, (q, k, v, *more))),
    )  # fmt: skip
    return choose(brief(key, n))


def describe(x: Tensor, rows: int, choice: Choice) -> Any:
    """Give a kernel a tensor as a descriptor of tiles [1, 1, rows, width], or as a pointer."""
    if not choice.descriptors:
        return x
    return TensorDescriptor(x, *layout_described(x), [1, 1, rows, padded(x.shape[3])])


def strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and token, tensor by tensor; that of the last axis is one."""
    result: list[int] = []
    for x in tensors:
        result += x.stride()[:3]
    return result


def numbers_of(call: "Call", q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What the forward kernels take after addresses: strides, sizes, the mask and the scale."""
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    return (
        *strides(q, k, v), per_sequence(call.sink), per_sequence(call.alibi), h, h // g, m, n, d, e, *call.interval,
        b * m, *call.factors,
    )  # fmt: skip


def renumbered(numbers: tuple[Any, ...], b: int, sizes: Sizes, interval: tuple[int, ...]) -> tuple[Any, ...]:
    """`numbers_of` a problem that differs in sizes alone; what the kernel takes after them stays."""
    m, n, _, q, k, v, *_ = sizes
    return *q[:3], *k[:3], *v[:3], *numbers[9:13], m, n, *numbers[15:17], *interval, b * m, *numbers[23:]


def longer(numbers: tuple[Any, ...], n: int, interval: tuple[int, ...]) -> tuple[Any, ...]:
    """`numbers_of` a problem that differs in its number of keys alone, and in what the mask makes of it."""
    return *numbers[:14], n, *numbers[15:17], *interval, *numbers[22:]


def per_sequence(x: Tensor | None) -> int:
    """Stride from a sequence's numbers per head, [b, h], to the next's; 0 where [h] serves all."""
    return 0 if x is None or x.ndim == 1 else x.shape[1]


def flags(call: Call, choice: Choice, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> dict[str, Any]:
    """What a kernel is compiled for."""
    m, n, d, e = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    far = 2**31 // max(choice.tile_m, choice.tile_n)
    return {
        "M": choice.tile_m, "N": choice.tile_n, "D": padded(d), "E": padded(e),
        "WHOLE_D": padded(d) == d, "WHOLE_E": padded(e) == e,
        "ROWS": call.rows is not None, "EACH": call.sequences is not None, "KEEP": call.lowered.keep > 0,
        "SOFTCAP": call.softcap is not None, "ALIBI": call.alibi is not None, "NEGATIVE": call.negative,
        "DEAD": not all_seen(call.lowered, m, n), "DESCRIPTOR": choice.descriptors,
        "FAR": max([x.stride(2) for x in (q, k, v, *more)]) >= far, "INTERPRET": INTERPRETED,
        "num_warps": choice.num_warps, "num_stages": choice.num_stages,
    }  # fmt: skip
