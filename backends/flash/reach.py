# pyright: basic, reportArgumentType=false, reportCallIssue=false
"""Masks that are one interval which moves with the row, lowered by integers alone: what every decoding step asks.

`longspan.spec.affine` defines it. What depends on a mask only is found once, and where lengths or offsets lie on the
device one small kernel lowers them there, in place of a dozen operations.
Shapes: b batch, m queries, n keys.
"""

from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.spec.masks import Causal, Chunks, Documents, Lengths, Mask, Prefix, Term, Window

from .plan import Bound, planned

FARTHEST: Final = 2**30  # tokens: positions and their differences stay inside int32
BLOCK: Final = 128  # sequences of a program


class Given(NamedTuple):
    """Tensors of a mask.

    Attributes:
        lengths: Keys of each sequence, [b].
        q_lengths: Queries of each document, [t] or [b, t].
        k_lengths: Its keys.
    """

    lengths: Tensor | None = None
    q_lengths: Tensor | None = None
    k_lengths: Tensor | None = None


NOTHING: Final = Given()
NUMBERS: Final = {Causal, Window, Prefix, Chunks}  # terms that hold no tensor


class Reach(NamedTuple):
    """How far the rows of a mask see around where they stand.

    Attributes:
        low: First key, counted from there; None if there is no left edge.
        high: Key before which a row stops to see, counted from there; None if there is no right edge.
        prefix: Keys that every row sees, and causally after them; None if there is no such edge.
        chunks: Sizes of chunks outside whose own a row sees nothing.
        keep: First keys that stay visible.
    """

    low: int | None
    high: int | None
    prefix: int | None = None
    chunks: tuple[int, ...] = ()
    keep: int = 0

    @property
    def moves(self) -> bool:
        """Whether rows of one document see one interval that moves with them."""
        return self.prefix is None and not self.chunks and not self.keep

    def interval(self, m: int, n: int, q_offset: int | None, k_offset: int) -> tuple[int, int, int, int, int]:
        """The integers of `Lowered`."""
        position = n - m if q_offset is None else q_offset - k_offset
        low = -m if self.low is None else min(max(position + self.low, -m), n)
        high = n if self.high is None else min(max(position + self.high, -m), n)
        return low, high, n, min(max(position, -FARTHEST), FARTHEST), 0


def told(mask: Mask) -> tuple[tuple[Term, ...], Given] | None:
    """Split a mask into terms that are numbers, and tensors; None if kernels lower it not."""
    terms, given = mask.terms, NOTHING
    for term in terms:
        if type(term) in NUMBERS:
            continue
        if isinstance(term, Lengths):
            given = Given(term.lengths)
        elif isinstance(term, Documents):
            given = Given(None, term.q_lengths, term.k_lengths)
        else:
            return None
        terms = tuple(x for x in mask.terms if x is not term)  # a mask has one of these at most
    return terms, given


@lru_cache(maxsize=1024)
def reach(terms: tuple[Term, ...]) -> Reach:
    """Find how far rows see under what `told` told."""
    windows = [term for term in terms if isinstance(term, Window)]
    highs = [term.ahead + 1 for term in windows] + [1 for term in terms if isinstance(term, Causal)]
    return Reach(
        max([1 - term.size for term in windows], default=None), min(highs, default=None),
        max([term.length for term in terms if isinstance(term, Prefix)], default=None),
        tuple(term.size for term in terms if isinstance(term, Chunks)),
        max([term.keep_first for term in windows], default=0),
    )  # fmt: skip


@planned
@triton.jit(
    do_not_specialize=["b", "lengths_s", "offsets_s", "m", "n", "position", "k_offset", "low", "high"],
    do_not_specialize_on_alignment=["lengths", "offsets"],
)
def sequences_kernel(
    lengths, offsets, sequences, b, lengths_s, offsets_s, m, n, position, k_offset, low, high,
    LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, PLACED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lower a mask for every sequence: low, high, stop and position.

    LENGTHS, OFFSETS: whether these are tensors. PLACED: whether one position serves all. LOW, HIGH: edges of a row.
    """
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = s < b
    none = tl.zeros([BLOCK], tl.int64)
    end = none + n
    if LENGTHS:
        end = tl.load(lengths + s * lengths_s, mask=there, other=0).to(tl.int64) - k_offset
    stands = end - m
    if OFFSETS:
        stands = tl.load(offsets + s * offsets_s, mask=there, other=0).to(tl.int64) - k_offset
    elif PLACED:
        stands = none + position
    first = none - m
    last = none + n
    if LOW:
        first = tl.minimum(tl.maximum(stands + low, none - m), none + n)
    if HIGH:
        last = tl.minimum(tl.maximum(stands + high, none - m), none + n)
    at = sequences + 4 * s
    tl.store(at, first.to(tl.int32), mask=there)
    tl.store(at + 1, last.to(tl.int32), mask=there)
    tl.store(at + 2, tl.minimum(tl.maximum(end, 0), none + n).to(tl.int32), mask=there)
    tl.store(at + 3, tl.minimum(tl.maximum(stands, -1073741824), 1073741824).to(tl.int32), mask=there)


class Each(NamedTuple):
    """How lengths or offsets were lowered, to be done again with others, or for other sizes."""

    bound: Bound
    b: int
    like: Tensor

    def resized(self, sees: Reach, m: int, n: int, given: Given, offsets: Tensor | int | None, k_offset: int) -> "Each":
        """Lower for other sizes."""
        numbers = numbers_of(sees, self.b, m, n, given.lengths, offsets, k_offset)
        return self._replace(bound=self.bound.resized(self.bound.grid, numbers))

    def __call__(self, given: Given, offsets: Tensor | int | None) -> tuple[Tensor, None] | None:
        """Lower; None if it cannot be repeated. Sequences, and no rows."""
        sequences, lengths = self.like.new_empty((self.b, 4)), given.lengths
        launched = self.bound(
            0 if lengths is None else lengths.data_ptr(),
            offsets.data_ptr() if isinstance(offsets, Tensor) else 0, sequences.data_ptr(),
        )  # fmt: skip
        return (sequences, None) if launched else None


def numbers_of(
    sees: Reach, b: int, m: int, n: int, lengths: Tensor | None, offsets: Tensor | int | None, k_offset: int
) -> tuple[int, ...]:
    """What the kernel takes after addresses."""
    return (
        b, 0 if lengths is None else lengths.stride(0), offsets.stride(0) if isinstance(offsets, Tensor) else 0,
        m, n, offsets - k_offset if isinstance(offsets, int) else 0, k_offset, sees.low or 0, sees.high or 0,
    )  # fmt: skip


def sequences_of(
    sees: Reach, b: int, m: int, n: int, lengths: Tensor | None, offsets: Tensor | int | None, k_offset: int
) -> tuple[Tensor, Each | None]:
    """Lower lengths or offsets, at least one of them a tensor, to int32 [b, 4]; say how to do it again."""
    source: Any = lengths if lengths is not None else offsets
    sequences: Tensor = source.new_empty((b, 4), dtype=torch.int32)
    if b == 0:
        return sequences, None
    bound = sequences_kernel[(-(-b // BLOCK),)](
        lengths, offsets if isinstance(offsets, Tensor) else None, sequences,
        *numbers_of(sees, b, m, n, lengths, offsets, k_offset),
        LENGTHS=lengths is not None, OFFSETS=isinstance(offsets, Tensor), PLACED=isinstance(offsets, int),
        LOW=sees.low is not None, HIGH=sees.high is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return sequences, None if bound is None else Each(bound, b, sequences.new_empty(0))


class Lowered(NamedTuple):
    """A mask in one of the two forms: rows if ``rows`` is given, else affine.

    Attributes:
        rows: int32 [4, b, m]: first, last, base and position of every row.
        sequences: int32 [b, 4]: low, high, stop and position of every sequence; None if one serves all.
        low: Key at which row 0 starts to see, affine.
        high: Key before which row 0 stops to see, affine.
        stop: Keys that there are, affine.
        position: Where row 0 stands among the keys, affine.
        keep: Keys at ``base`` that stay visible, rows.
        again: How to make ``rows`` or ``sequences`` again; None if they were not made by a kernel.
    """

    rows: Tensor | None
    sequences: Tensor | None
    low: int
    high: int
    stop: int
    position: int
    keep: int
    again: Any = None

    @property
    def interval(self) -> list[int]:
        """The integers, in the order in which kernels take them."""
        return [self.low, self.high, self.stop, self.position, self.keep]


def all_seen(lowered: Lowered, m: int, n: int) -> bool:
    """Say, from the integers alone, whether every key is seen by some query, so that none may hold NaN."""
    return lowered.rows is None and lowered.sequences is None and any_sees(m, n, *lowered.interval)


def any_sees(m: int, n: int, low: int, high: int, stop: int, *_: int) -> bool:
    """Say of an interval whether every key is seen by some query."""
    return m > 0 and low <= 0 and m - 1 + high >= n and stop >= n


def each_sees(m: int, n: int, low: int, high: int, stop: int, *_: int) -> bool:
    """Say of an interval whether every key is seen by every query."""
    return low <= 1 - m and high >= n and stop >= n
