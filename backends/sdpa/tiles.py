"""Cut a mask into rectangles that a kernel serves: tiles of query rows, and of each the parts of its keys.

A part is seen in full, seen causally (a square, top-left), or cut: then it needs a mask, of the size of the part.
Wherever the mask is causal or constant over many rows the tile is as long as that lasts, and needs no mask at all;
elsewhere tiles have so few rows that their masks are O(tokens) altogether.
Shapes: m queries, n keys, of one sequence.
"""

from itertools import pairwise
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from longspan.spec import Bounds

WASTE: Final = 2  # a tile is halved while its parts have over twice as many scores as the mask shows


class Part(NamedTuple):
    """Keys ``[start, stop)`` of a tile, and how its rows see them."""

    start: int
    stop: int
    kind: Literal["full", "causal", "cut"]


class Tile(NamedTuple):
    """Query rows ``[start, stop)``, and disjoint parts that hold every key they see."""

    start: int
    stop: int
    parts: tuple[Part, ...]


class Rows(NamedTuple):
    """What every row of a sequence sees, as in `Bounds`, as Python integers."""

    first: list[int]
    last: list[int]
    base: list[int]
    keep: int


def tiles(seen: Bounds, rows: tuple[int, int]) -> list[Tile]:
    """Plan attention of one sequence.

    Args:
        seen: Bounds of the sequence, [1, m] each, on the CPU.
        rows: Fewest and most rows of a tile that is cut.

    Returns:
        Tiles in the order of their rows; a row in none of them sees nothing.
    """
    first, last, base = (x[0] for x in (torch.minimum(seen.first, seen.last), seen.last, seen.base))
    of = Rows(first.tolist(), last.tolist(), base.tolist(), seen.keep)
    plan: list[Tile] = []
    done = 0
    for start, stop, causal in steady(first, last, headless=(base >= first) | (seen.keep == 0)):
        begin = max(start, done)
        if stop - begin >= rows[0]:
            plan += ragged(of, done, begin, rows)
            plan += steady_tile(of, begin, stop, causal=causal)
            done = stop
    return plan + ragged(of, done, len(of.first), rows)


def steady(first: Tensor, last: Tensor, *, headless: Tensor) -> list[tuple[int, int, bool]]:
    """List the longest runs of rows whose interval stays (False) or grows by one key a row (True)."""
    growth = last.diff()
    same = (first.diff() == 0) & headless[1:] & headless[:-1] & ((growth == 0) | (growth == 1))
    kinds, counts = torch.where(same, growth, -1).unique_consecutive(return_counts=True)
    runs, row = [], 0
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        if kind >= 0:
            runs.append((row, row + count + 1, kind == 1))
        row += count
    return runs


def steady_tile(of: Rows, start: int, stop: int, *, causal: bool) -> list[Tile]:
    """Serve a run of rows with no mask: what the first row sees, and a square after it where the run is causal."""
    first, last = of.first[start], of.last[start]
    if causal and first == last:  # the run begins with a row that sees nothing
        start, last = start + 1, last + 1
    if first == last or start == stop:
        return []
    if not causal:
        return [Tile(start, stop, (Part(first, last, "full"),))]
    square = Part(last - 1, last - 1 + stop - start, "causal")
    return [Tile(start, stop, (Part(first, last - 1, "full"), square) if first < last - 1 else (square,))]


def ragged(of: Rows, start: int, stop: int, rows: tuple[int, int]) -> list[Tile]:
    """Serve any rows: as few tiles as waste little."""
    if start >= stop:
        return []
    shown = sum(of.last[start:stop]) - sum(of.first[start:stop])
    size = min(max(shown // (stop - start), rows[0]), rows[1])
    return [tile for row in range(start, stop, size) for tile in halves(of, row, min(row + size, stop), rows[0])]


def halves(of: Rows, start: int, stop: int, fewest: int) -> list[Tile]:
    """Make one tile, or two halves where most of its scores would be hidden."""
    parts = segments(of, start, stop)
    shown = sum(last - first for first, last in zip(of.first[start:stop], of.last[start:stop], strict=True))
    scores = (stop - start) * sum(part.stop - part.start for part in parts)
    if stop - start > 1 and scores > WASTE * shown + fewest * fewest + (stop - start) * of.keep:
        middle = (start + stop) // 2
        return halves(of, start, middle, fewest) + halves(of, middle, stop, fewest)
    if len(parts) > 1 and parts[-1].stop - parts[0].start <= 2 * fewest:
        parts = [Part(parts[0].start, parts[-1].stop, "cut")]  # one small call is cheaper than three smaller ones
    return [Tile(start, stop, tuple(parts))] if parts else []


def segments(of: Rows, start: int, stop: int) -> list[Part]:
    """Cut the keys wherever the number of rows that see them begins or ends to change."""
    low, high, base = of.first[start:stop], of.last[start:stop], of.base[start:stop]
    n = max(high)
    edges = {min(low), max(low), min(high), n}
    if of.keep:
        edges |= {min(base), max(base), min(base) + of.keep, max(base) + of.keep}
    parts: list[Part] = []
    for a, b in pairwise(sorted({min(max(edge, 0), n) for edge in edges})):
        body = overlap(a, b, low, high)
        head = overlap(a, b, base, [min(x + of.keep, y) for x, y in zip(base, high, strict=True)])
        if body == "none" and head == "none":
            continue
        kind = "full" if "full" in (body, head) else "cut"
        joins = bool(parts) and parts[-1].stop == a and parts[-1].kind == kind
        parts.append(Part(parts.pop().start if joins else a, b, kind))
    return parts


def overlap(a: int, b: int, low: list[int], high: list[int]) -> Literal["none", "some", "full"]:
    """Tell whether keys ``[a, b)`` lie in all, none or some of the intervals ``[low, high)``."""
    if max(low) <= a and b <= min(high):
        return "full"
    return "some" if any(x < b and a < y and x < y for x, y in zip(low, high, strict=True)) else "none"
