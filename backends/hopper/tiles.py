# pyright: basic, reportArgumentType=false, reportCallIssue=false
"""Which tile of queries comes next, and which tiles of keys it needs: whole numbers, and no tensor.

Kernels inline these; `tests/test_hopper_tiles.py` calls the same functions as Python. No operand of ``//`` is negative,
where Triton and Python disagree.
Shapes: a tile of queries has ROWS rows, one of keys N.
"""

from .gluon import gl, gluon


@gluon.jit
def place(index, tiles, heads, HEADS: gl.constexpr, LONGEST_FIRST: gl.constexpr):
    """Tile of queries and head (of all sequences) that come at a place of the order: ``(tile, head)``.

    HEADS heads at a time, so that their keys and values stay in the L2 cache. Among them, the last tiles first where
    those have the most keys to read (a causal mask): what is started last must not end last.
    """
    size = HEADS * tiles
    group = index // size
    rest = index - group * size
    if LONGEST_FIRST:
        width = min(HEADS, heads - group * HEADS)
        down = rest // width
        head = group * HEADS + rest - down * width
        tile = tiles - 1 - down
    else:
        across = rest // tiles
        head = group * HEADS + across
        tile = rest - across * tiles
    return tile, head


@gluon.jit
def keys_of(row, m, low, high, stop, ROWS: gl.constexpr, N: gl.constexpr):
    """Tiles of keys that queries ``row … row + ROWS - 1`` need under an affine mask, and those that need no mask.

    Row i sees keys ``max(i + low, 0) <= j < min(i + high, stop)``. Returns ``(first, last, full_first, full_last)``,
    half-open, in tiles, full inside all; nothing at all where there is no such row.
    """
    end = min(row + ROWS, m) - 1
    first = max(row + low, 0) // N
    last = max((max(min(end + high, stop), 0) + N - 1) // N, first)
    full_first = min((max(end + low, 0) + N - 1) // N, last)
    full_last = max(min(max(min(row + high, stop), 0) // N, last), full_first)
    if row >= m:
        first = first * 0
        last = first
        full_first = first
        full_last = first
    return first, last, full_first, full_last


@gluon.jit
def within(first, last, full_first, full_last, outer_first, outer_last):
    """Fit a warpgroup's tiles into those that are loaded for all of its program: at least one, whatever it sees.

    A warpgroup that sees nothing takes the last tile, under a mask that hides it whole.
    """
    if first >= last:
        last = max(outer_last, outer_first + 1)
        first = last - 1
        full_first = first
        full_last = first
    return first, last, full_first, full_last
