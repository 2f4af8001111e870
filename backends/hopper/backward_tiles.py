# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
"""Which block of threads works on which keys, and which tiles of queries it walks over: integers only.

The functions are also plain Python (`assignment.fn`), and are tested as such; division is of nonnegative numbers.
Shapes: M queries and N keys of a tile.
"""

from .gluon import gl, gluon


@gluon.jit
def assignment(program, key_tiles, key_heads, batches, together):
    """Give a program a tile of keys: tile, key head, batch.

    ``together`` heads are worked on at the same time, so that their queries share the L2 cache; among those the first
    tiles come first, which under a causal mask are seen by the most queries: started last they would end last.
    """
    chunk = program // (together * key_tiles)
    rest = program - chunk * (together * key_tiles)
    width = min(key_heads * batches - chunk * together, together)
    tile = rest // width
    line = chunk * together + rest - tile * width
    batch = line // key_heads
    return tile, line - batch * key_heads, batch


@gluon.jit
def sight(lowest, highest, full_lowest, full_highest, M: gl.constexpr):
    """Cut rows ``[lowest, highest)`` into tiles aligned to M; full are those in ``[full_lowest, full_highest)``.

    Returns where the first tile begins and the last one ends, and the same of the full ones among them.
    """
    low = lowest // M * M
    high = max((highest + M - 1) // M * M, low)
    if highest <= lowest:
        high = low
    full_low = min((full_lowest + M - 1) // M * M, high)
    full_high = max(min(full_highest // M * M, high), full_low)
    return low, high, full_low, full_high


@gluon.jit
def affine_sight(start, m, low, high, stop, M: gl.constexpr, N: gl.constexpr):
    """See `sight`, for keys ``[start, start + N)`` where row i sees ``i + low <= j < min(i + high, stop)``."""
    lowest = min(max(start - high + 1, 0), m)
    highest = max(min(min(start + N, stop) - low, m), 0)
    full_lowest = max(start + N - high, 0)
    full_highest = max(min(start - low + 1, m), 0)
    if start >= stop:
        highest = 0
    # Rows past the end weigh nothing, so that a tile that holds the last row may be full.
    if full_highest == m:
        full_highest = m + M - 1
    if start + N > stop:
        full_highest = 0
    return sight(lowest, highest, full_lowest, full_highest, M)


@gluon.jit
def sight_of_tile(
    tile, batch, m, low, high, stop, sequences, seers, key_tiles,
    M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Say which tiles of queries see a tile of keys: see `sight`; then which see it only as the head of a document."""
    if ROWS:
        at = seers + 6 * (batch * key_tiles + tile).to(gl.int64)
        low, high, full_low, full_high = sight(gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), M)
        head_low = high
        head_high = high
        if KEEP:
            head_low = max(gl.load(at + 4) // M * M, high)
            head_high = max((gl.load(at + 5) + M - 1) // M * M, head_low)
    else:
        if EACH:
            low = gl.load(sequences + 4 * batch)
            high = gl.load(sequences + 4 * batch + 1)
            stop = gl.load(sequences + 4 * batch + 2)
        low, high, full_low, full_high = affine_sight(tile * N, m, low, high, stop, M, N)
        head_low = high
        head_high = high
    return low, high, full_low, full_high, head_low, head_high


@gluon.jit
def advance(start, line, low, high, head_low, head_high, stride, M: gl.constexpr, KEEP: gl.constexpr):
    """Go to the next tile of queries, and after the last to the first of the next head, ``stride`` lines on."""
    start += M
    if KEEP:
        if start == high:
            start = head_low
        if start == head_high:
            start = low
            if low == high:
                start = head_low
            line += stride
    elif start == high:
        start = low
        line += stride
    return start, line


@gluon.jit
def walk(
    program, group, h, m, low, high, stop, sequences, seers, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Say what is to be done: the tile of keys, of which key head and batch, and over how many tiles of queries.

    Then where the first of them starts, and the rest of what `advance` goes on with; see `sight_of_tile`.
    """
    tile, key_head, batch = assignment(program, key_tiles, h // group, batches, together)
    low, high, full_low, full_high, head_low, head_high = sight_of_tile(
        tile, batch, m, low, high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP
    )
    steps = (high - low + head_high - head_low) // M * group
    start = low
    if KEEP and low == high:
        start = head_low
    return tile, key_head, batch, steps, start, low, high, full_low, full_high, head_low, head_high
