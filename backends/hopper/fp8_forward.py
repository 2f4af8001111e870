"""From quantised heads to the kernel of `fp8_kernel`: what it is compiled for, descriptors, results.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.spec import Quantised

from ..flash.decode_choices import processors
from ..flash.launch import LOG2_E
from ..flash.reach import Lowered, all_seen, each_sees
from .fp8_kernel import fp8_kernel
from .gluon import gl
from .launch import describe, padded
from .values import Values


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Everything that the kernel knows when it is compiled, named as in the kernel.

    Attributes:
        W: Warpgroups that compute.
        M: Queries of each.
        N: Keys of a tile.
        D: Head dimension in shared memory.
        E: Value dimension in shared memory.
        STAGES: Tiles of keys, and of values, that shared memory holds.
        REGISTERS: Registers of a thread of a computing warpgroup.
        LOADER: Registers of a thread of the loading warp.
        HEADS: Heads whose tiles are computed side by side, sharing the L2 cache.
        MASKED: Whether some row does not see some key of a tile.
        LEFT: Whether the mask may hide keys on the left of those that a row sees.
        DEAD: Whether keys that nobody sees, which may hold NaN, can lie in a tile that is read.
        PARTS: In how many parts of their width values are multiplied: registers hold one beside the sums.
        STAGED: Whether out leaves through shared memory; else it leaves from registers.
    """

    W: int
    M: int
    N: int
    D: int
    E: int
    STAGES: int
    REGISTERS: int
    LOADER: int
    HEADS: int
    MASKED: bool
    LEFT: bool
    DEAD: bool
    PARTS: int
    STAGED: bool

    @property
    def SCORES(self) -> Any:  # noqa: N802 - named as the constants of the kernel
        """Layout of scores [M, N] in registers: an accumulator."""
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.N, 32]))

    @property
    def OUT(self) -> Any:  # noqa: N802
        """Layout of sums of values [M, E]: an accumulator."""
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.E // self.PARTS, 32]))

    @property
    def SUMS(self) -> Any:  # noqa: N802
        """Layout of sums of weights [M, 8]: of every eight columns of `SCORES`, the two that a thread holds."""
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32]))


def variant(seen: Lowered, m: int, n: int, d: int, e: int, out_dtype: torch.dtype) -> Variant:
    """Choose how a call is computed."""
    width = max(padded(d), padded(e))
    warpgroups, keys = (3, 128) if width == 64 else (2, 256) if width == 128 else (2, 128)
    masked = not (each_sees(m, n, *seen.interval) and n % keys == 0)
    # Of the widest heads there are not registers for a mask and for addresses in shared memory.
    staged = out_dtype.itemsize == 2 and not (width == 256 and masked)
    return Variant(
        W=warpgroups, M=64, N=keys, D=width, E=width, STAGES={64: 4, 128: 2, 256: 2 if staged else 3}[width],
        REGISTERS=160 if warpgroups == 3 else 240, LOADER=32 if warpgroups == 3 else 24, HEADS=8,
        MASKED=masked, LEFT=seen.low > 1 - m, DEAD=not all_seen(seen, m, n), PARTS=2 if width == 256 else 1,
        STAGED=staged,
    )  # fmt: skip


def forward(
    q: Quantised, k: Quantised, v: Values, seen: Lowered, scale: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel on values ``[b, g, e, n]``: ``out [b, h, m, e]`` contiguous, and ``lse [b, h, m]`` float32."""
    (b, h, m, d), (_, g, e, _) = q.values.shape, v.values.shape
    out = torch.empty(b, h, m, e, dtype=out_dtype, device=q.values.device)
    lse = torch.empty(b, h, m, dtype=torch.float32, device=q.values.device)
    if out.numel() == 0:
        return out, lse
    if v.n == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    form = variant(seen, m, v.n, d, e, out_dtype)
    tiles = -(-m // (form.W * form.M))
    total, programs = tiles * b * h, processors(q.values.device.index)
    # Each launch counts its own tiles, from zero; where there are programs for all of them, none is counted.
    counter = lse.view(torch.int32) if total <= programs else torch.zeros_like(lse.view(-1)[:1], dtype=torch.int32)
    fp8_kernel[(min(total, programs),)](
        describe(q.values, form.M, form.D), describe(k.values, form.N, form.D), describe(v.values, form.E, form.N),
        describe(out.view(b * h, m, e), form.M, form.E) if form.STAGED else out, out, lse,
        *(x.scale.contiguous() for x in (q, k, v)), counter, total, tiles, h, h // g, m, b, e,
        seen.low, seen.high, seen.stop, scale * LOG2_E, C=form, num_warps=4,
    )  # fmt: skip
    return out, lse
