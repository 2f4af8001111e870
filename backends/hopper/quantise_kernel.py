# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Heads to e4m3 in two readings: the largest of every head, then the numbers (`longspan.spec.quantise`).

Queries and keys can be turned by a Hadamard matrix on the way (`longspan.spec.hadamard`): its entries are signs, which
the tensor cores multiply exactly. Values are written transposed, keys contiguous, in the order in which a thread of
`fp8_kernel` holds weights: of every 16 keys, key 8u + 2t + c lies at place 4t + 2u + c (t < 4; u, c < 2).
Shapes: T tokens of a tile, D head dimension padded to a power of two.
"""

import triton
import triton.language as tl

from ..flash.plan import planned

LARGEST = tl.constexpr(448.0)
LEAST = tl.constexpr(2.0**-126)


@triton.jit
def heads_of(x, signs, line, token, n, d, h, x_b, x_h, x_n, TURNED: tl.constexpr, D: tl.constexpr):
    """Tokens of a head [T, D] in float32, turned or as they are; zeros where there are none."""
    column = tl.arange(0, D)
    at = x + (line // h).to(tl.int64) * x_b + (line % h).to(tl.int64) * x_h + token.to(tl.int64)[:, None] * x_n
    tile = tl.load(at + column[None, :], mask=(token < n)[:, None] & (column < d)[None, :], other=0.0)
    if TURNED:
        sign = tl.load(signs + column).to(tile.dtype)
        # Entry (i, j) of Sylvester's matrix is -1 where i and j share an odd number of bits.
        shared = column[:, None] & column[None, :]
        shared = shared ^ (shared >> 4)
        shared = shared ^ (shared >> 2)
        shared = (shared ^ (shared >> 1)) & 1
        matrix = (1 - 2 * shared).to(tile.dtype)
        return tl.dot(tile * sign[None, :], matrix) * (1.0 / tl.sqrt(tl.full([1, 1], D, tl.float32)))
    return tile.to(tl.float32)


@planned
@triton.jit(do_not_specialize=["n"])
def largest_kernel(x, signs, largest, n, d, h, x_b, x_h, x_n, TURNED: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """Find the largest finite magnitude of every head: float32 [b · h], zero before."""
    line = tl.program_id(1)
    token = tl.program_id(0) * T + tl.arange(0, T)
    size = tl.abs(heads_of(x, signs, line, token, n, d, h, x_b, x_h, x_n, TURNED, D))
    most = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), axis=1), axis=0)
    # Bits of numbers that are not negative are in the order of the numbers.
    tl.atomic_max(largest.to(tl.pointer_type(tl.int32)) + line, most.to(tl.int32, bitcast=True), sem="relaxed")


@planned
@triton.jit(do_not_specialize=["n"])
def quantise_kernel(
    x, signs, largest, values, scale, n, d, h, x_b, x_h, x_n, whole,
    TURNED: tl.constexpr, VALUES: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Divide by the scale and round: e4m3 [b, h, n, d], or [b, h, d, whole] of values; and write scales [b, h]."""
    line = tl.program_id(1)
    place = tl.program_id(0) * T + tl.arange(0, T)
    token = place
    if VALUES:
        token = (place & ~15) + 8 * ((place >> 1) & 1) + 2 * ((place >> 2) & 3) + (place & 1)
    tile = heads_of(x, signs, line, token, n, d, h, x_b, x_h, x_n, TURNED, D)
    by = tl.maximum(tl.div_rn(tl.load(largest + line), LARGEST), LEAST)
    if tl.program_id(0) == 0:
        tl.store(scale + line, by)
    small = tl.div_rn(tile, tl.broadcast_to(by, tile.shape))
    small = tl.where(tl.abs(tile) < float("inf"), small, float("nan")).to(tl.float8e4nv)  # not the largest there is
    column = tl.arange(0, D)
    base = values + line.to(tl.int64) * d * whole
    if VALUES:
        at = base + column.to(tl.int64)[:, None] * whole + place[None, :]
        tl.store(at, tl.trans(small), mask=(column < d)[:, None] & (place < whole)[None, :])
    else:
        at = base + place.to(tl.int64)[:, None] * d + column[None, :]
        tl.store(at, small, mask=(place < n)[:, None] & (column < d)[None, :])
