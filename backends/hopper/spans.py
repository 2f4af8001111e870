# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Which tiles of keys each tile of queries needs, from int32 bounds per row: one small launch before the kernel.

Shapes: b batch, m queries, t tiles of queries of W · M rows, N keys of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..flash.plan import Bound, planned
from .launch import Call

FIELDS = 16  # int32 of a tile of queries, of which 4 + 4 W are used


@planned
@triton.jit(do_not_specialize=["m", "rows_size", "n", "keep"])
def spans_kernel(rows, plan, m, rows_size, n, keep, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Write first and last tile of the program's keys, of the head's, then first, last and full of each warpgroup."""
    tile = tl.program_id(0)
    batch = tl.program_id(1)
    at = rows + batch.to(tl.int64) * m
    out = plan + (batch * tl.num_programs(0) + tile) * 16
    first = n
    last = n * 0
    head_first = n
    head_last = n * 0
    for w in tl.static_range(W):
        i = (tile * W + w) * M + tl.arange(0, M)
        start = tl.load(at + i, mask=i < m, other=0)
        stop = tl.load(at + rows_size + i, mask=i < m, other=0)
        base = tl.maximum(tl.load(at + 2 * tl.cast(rows_size, tl.int64) + i, mask=i < m, other=0), 0)
        seen = (i < m) & (start < stop)
        first = tl.minimum(first, tl.min(tl.where(seen, start, n), 0))
        last = tl.maximum(last, tl.max(tl.where(seen, stop, 0), 0))
        end = tl.minimum(base + keep, stop)
        kept = (i < m) & (base < end)
        head_first = tl.minimum(head_first, tl.min(tl.where(kept, base, n), 0))
        head_last = tl.maximum(head_last, tl.max(tl.where(kept, end, 0), 0))
    # Rows that see a head alone may see it behind what the others see: the interval is read to its end.
    last = tl.where(last > 0, tl.maximum(last, head_last), last)
    first = tl.minimum(first, last) // N
    last = tl.maximum(tl.cdiv(last, N), first)
    if keep == 0:
        last = tl.maximum(last, first + 1)
    # The head's tiles that the interval does not hold already: those before it.
    head_first = tl.minimum(head_first, head_last) // N
    head_last = tl.maximum(tl.minimum(tl.cdiv(head_last, N), tl.where(last > first, first, n)), head_first)
    if (last == first) & (head_last == head_first):
        last = first + 1
    tl.store(out, first)
    tl.store(out + 1, last)
    tl.store(out + 2, head_first)
    tl.store(out + 3, head_last)
    for w in tl.static_range(W):
        i = (tile * W + w) * M + tl.arange(0, M)
        start = tl.load(at + i, mask=i < m, other=0)
        stop = tl.load(at + rows_size + i, mask=i < m, other=0)
        seen = (i < m) & (start < stop)
        own_last = tl.cdiv(tl.max(tl.where(seen, stop, 0), 0), N)
        own_first = tl.minimum(tl.min(tl.where(seen, start, n), 0) // N, own_last)
        full_first = tl.cdiv(tl.max(tl.where(i < m, start, 0), 0), N)
        full_last = tl.min(tl.where(i < m, stop, n), 0) // N
        if (keep > 0) | (own_first >= own_last):
            own_first = first
            own_last = last
        full_first = tl.minimum(tl.maximum(full_first, own_first), own_last)
        full_last = tl.minimum(tl.maximum(full_last, full_first), own_last)
        tl.store(out + 4 + 4 * w, own_first)
        tl.store(out + 5 + 4 * w, own_last)
        tl.store(out + 6 + 4 * w, full_first)
        tl.store(out + 7 + 4 * w, full_last)


def spans(call: Call, m: int, n: int, warpgroups: int, tall: int, wide: int) -> tuple[Tensor, Bound | None]:
    """Find the tiles of every tile of queries, int32 [b, t, 16], and say how to find them again."""
    assert call.rows is not None  # noqa: S101 - for type checkers
    b, tiles = call.rows.shape[1], -(-m // (warpgroups * tall))
    plan = torch.empty(b, tiles, FIELDS, dtype=torch.int32, device=call.rows.device)
    bound = spans_kernel[tiles, b](
        call.rows, plan, m, b * m, n, call.interval[4], W=warpgroups, M=tall, N=wide, num_warps=1
    )
    return plan, bound
