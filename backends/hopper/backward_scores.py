# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportAssignmentType=false
"""What both backward kernels do with numbers in registers: mask scores, add to dQ, leave a word for each other.

Shapes: H keys of a warpgroup and M queries of a tile; i counts queries, j keys.
"""

from .gluon import gl, gluon


@gluon.jit
def write_number(place, number, WARPS: gl.constexpr):
    """Leave an integer in shared memory."""
    place.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def read_number(place, WARPS: gl.constexpr):
    """Read an integer from shared memory."""
    return gl.sum(place.load(gl.BlockedLayout([1], [32], [WARPS], [0])), axis=0)


@gluon.jit
def without_dead(tile, dtype: gl.constexpr):
    """Write zeros over NaN and infinity: only keys that no query sees may hold them, and 0 · NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = tile.load(LAYOUT).to(gl.float32)
    tile.store(gl.where(gl.abs(x) < float("inf"), x, 0.0).to(dtype))


@gluon.jit
def masked(
    score, i, j, m, batch, low, high, stop, keep, rows, rows_size, sequences,
    hidden: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Write ``hidden`` over scores or weights [H, M] of keys j that queries i do not see.

    Queries past the end weigh nothing anyhow.
    """
    if ROWS:
        # Bound by bound: each is loaded, used and forgotten, since registers are short.
        at = rows + batch.to(gl.int64) * m
        keys = j[:, None]
        seen = gl.load(at + i, mask=i < m, other=0)[None, :] <= keys
        if KEEP:
            base = gl.load(at + 2 * rows_size.to(gl.int64) + i, mask=i < m, other=0)[None, :]
            seen = seen | ((base <= keys) & (keys < base + keep))
        score = gl.where(seen, score, hidden)
        seen = keys < gl.load(at + rows_size + i, mask=i < m, other=0)[None, :]
    else:
        if EACH:
            low = gl.load(sequences + 4 * batch)
            high = gl.load(sequences + 4 * batch + 1)
            stop = gl.load(sequences + 4 * batch + 2)
        ahead = j[:, None] - i[None, :]
        seen = (ahead >= low) & (ahead < high) & (j < stop)[:, None]
    return gl.where(seen, score, hidden)


@gluon.jit
def penalised(
    score, i, j, m, batch, alibi, head, position, rows, rows_size, sequences,
    ROWS: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """Subtract ALiBi's slope times the distance from the scores [H, M], over ln 2."""
    if ROWS:
        at = rows + 3 * rows_size.to(gl.int64) + batch.to(gl.int64) * m
        stands = gl.load(at + i, mask=i < m, other=0)
    else:
        if EACH:
            position = gl.load(sequences + 4 * batch + 3)
        stands = i + position
    slope = gl.load(alibi + head).to(gl.float32) * 1.4426950408889634
    return score - slope * gl.abs(stands[None, :] - j[:, None]).to(gl.float32)


@gluon.jit
def by_fours(part, COLUMNS: gl.constexpr):
    """View what the tensor cores left in registers, [64, COLUMNS], as rows of 512 numbers, a thread's four in a row.

    A thread has two neighbours of its row and of the eighth row below, in every block of eight columns. Nothing moves:
    this is the order in which parts of dQ lie in memory, 64 · COLUMNS numbers in a row, and `finish_kernel` sorts them.
    """
    FOURS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    part = gl.reshape(part, [4, 2, 8, COLUMNS // 8, 4, 2])  # warp, upper or lower, row, block, thread, neighbour
    part = gl.reshape(gl.permute(part, [3, 0, 2, 4, 1, 5]), [COLUMNS // 8, 512])
    return gl.convert_layout(part, FOURS, assert_trivial=True)


@gluon.jit
def from_fours(tile, M: gl.constexpr, LAYOUT: gl.constexpr):
    """Load scores [64, M] that another warpgroup left in shared memory `by_fours`: they lie as its own would."""
    FOURS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    part = gl.reshape(tile.load(FOURS), [M // 8, 4, 8, 4, 2, 2])
    part = gl.reshape(gl.permute(part, [1, 4, 2, 0, 3, 5]), [64, M])
    return gl.convert_layout(part, LAYOUT, assert_trivial=True)


@gluon.jit
def add_queries(sums, part, COLUMNS: gl.constexpr):
    """Add a part [64, COLUMNS] of dQ to memory from registers, four numbers at a time; see `by_fours`."""
    FOURS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    block = gl.arange(0, COLUMNS // 8, gl.SliceLayout(1, FOURS))
    number = gl.arange(0, 512, gl.SliceLayout(0, FOURS))
    gl.atomic_add(sums + (block[:, None] * 512 + number[None, :]), by_fours(part, COLUMNS), sem="relaxed")
