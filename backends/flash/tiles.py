# pyright: basic, reportArgumentType=false
"""What the attention kernels share: how a tile is loaded, multiplied, scored and masked.

Shapes: M queries and N keys of a tile, D head dimension padded to a power of two, W whichever of the two dimensions.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    source, batch, head, row, rows, width, stride_b, stride_h, stride_n,
    N: tl.constexpr, W: tl.constexpr,
    WHOLE: tl.constexpr, CUT: tl.constexpr, DESCRIPTOR: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Load rows [row, row + N) of a head, zeros past its ``rows`` and past its ``width``: [N, W].

    WHOLE: the width needs no padding. CUT: some rows may lie past the end. FAR: a tile spans more than 2^31 elements.
    """
    if DESCRIPTOR:
        # The copy engine fills what lies outside with zeros.
        tile = source.load([batch, head, row, 0]).reshape([N, W])
    else:
        # The tile's origin in 64 bits, once; inside the tile 32 bits do, and cost half the registers.
        origin = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_n
        down = tl.arange(0, N)
        across = tl.arange(0, W)
        if FAR:
            at = origin + down.to(tl.int64)[:, None] * stride_n + across[None, :]
        else:
            at = origin + down[:, None] * stride_n + across[None, :]
        if CUT and WHOLE:
            tile = tl.load(at, mask=(row + down < rows)[:, None], other=0.0)
        elif CUT:
            tile = tl.load(at, mask=(row + down < rows)[:, None] & (across < width)[None, :], other=0.0)
        elif WHOLE:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(across < width)[None, :], other=0.0)
    return tile


@triton.jit
def multiply(a, b, acc, INTERPRET: tl.constexpr):
    """``acc + a @ b`` in float32, without tf32."""
    if INTERPRET:
        # The interpreter would multiply the bit patterns of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr):
    """``a @ b`` in float32, without tf32."""
    return multiply(a, b, tl.zeros([ROWS, COLUMNS], tl.float32), INTERPRET)


@triton.jit
def base_two(dots, scale, inner, outer, SOFTCAP: tl.constexpr):
    """Turn ``q · k`` into scaled, capped scores over ln 2, so that exp2 is the exponential.

    ``scale`` is that of the scores over ln 2; with a cap c, ``inner`` is 2 scale / (c ln 2) and ``outer`` c / ln 2.
    """
    if SOFTCAP:
        # tanh x = 1 - 2 / (1 + exp 2x), which neither end overflows.
        score = outer * (1.0 - 2.0 / (1.0 + tl.exp2(dots * inner)))
    else:
        score = dots * scale
    return score


@triton.jit
def load_interval(
    i, m, batch, low, high, stop, rows, rows_size, sequences, ROWS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """First and last key of every row of a tile; rows past the end see nothing: [M], [M]."""
    if ROWS:
        at = rows + batch.to(tl.int64) * m + i
        first = tl.load(at, mask=i < m, other=0)
        last = tl.load(at + rows_size, mask=i < m, other=0)
    else:
        if EACH:
            low = tl.load(sequences + 4 * batch)
            high = tl.load(sequences + 4 * batch + 1)
            stop = tl.load(sequences + 4 * batch + 2)
        first = tl.maximum(i + low, 0)
        last = tl.where(i < m, tl.minimum(i + high, stop), 0)
    return first, last


@triton.jit
def load_base(i, m, batch, rows, rows_size):
    """Where the head of every row of a tile begins: [M]."""
    return tl.load(rows + 2 * tl.cast(rows_size, tl.int64) + batch.to(tl.int64) * m + i, mask=i < m, other=0)


@triton.jit
def load_position(i, m, batch, position, rows, rows_size, sequences, ROWS: tl.constexpr, EACH: tl.constexpr):
    """Where every row of a tile stands among the keys: [M]."""
    if ROWS:
        at = rows + 3 * tl.cast(rows_size, tl.int64) + batch.to(tl.int64) * m
        stands = tl.load(at + i, mask=i < m, other=0)
    elif EACH:
        stands = i + tl.load(sequences + 4 * batch + 3)
    else:
        stands = i + position
    return stands


@triton.jit
def visible(first, last, base, keep, j, KEEP: tl.constexpr):
    """Which keys j a row sees; the arguments broadcast against each other."""
    seen = (first <= j) & (j < last)
    if KEEP:
        seen = seen | ((base <= j) & (j < base + keep) & (j < last))
    return seen


@triton.jit
def split(low, high, full_low, full_high, SIZE: tl.constexpr):
    """Cut ``[low, high)`` into tiles aligned to SIZE: some before the full ones, the full ones, some after.

    Full tiles lie inside ``[full_low, full_high)``. Returns where each of the three begins and how many it has.
    """
    low = low // SIZE * SIZE
    full_low = tl.cdiv(full_low, SIZE) * SIZE
    full_high = full_high // SIZE * SIZE
    none = full_high <= full_low
    full_low = tl.where(none, low, full_low)
    full_high = tl.where(none, low, full_high)
    left = (full_low - low) // SIZE
    full = (full_high - full_low) // SIZE
    right = tl.cdiv(tl.maximum(high - full_high, 0), SIZE)
    return low, left, full_low, full, full_high, right


@triton.jit
def cut_start(t, head_low, heads, low, left, full_high, SIZE: tl.constexpr):
    """Where the t-th cut tile begins: the head's first, then those left of the full ones, then those right."""
    start = tl.where(t < heads + left, low + (t - heads) * SIZE, full_high + (t - heads - left) * SIZE)
    return tl.where(t < heads, head_low + t * SIZE, start)
