# pyright: basic, reportArgumentType=false, reportCallIssue=false
"""Masks whose rows need bounds of their own, lowered by one small kernel on the device where they are wanted.

`longspan.spec.bounds` defines them; some thirty operations of torch would lower them as well, one launch each.
Shapes: b batch, m queries, n keys, t documents.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import Bound, planned
from .reach import Given, Reach

BLOCK: Final = 128  # rows of a program
DOCUMENTS: Final = 16  # that are looked at together
CHUNKS: Final = 2  # sizes of chunks in one mask


@triton.jit
def documents_of(row, s, q_lengths, k_lengths, m, t, q_s, q_b, k_s, k_b, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Where the keys of each row's document start and stop, and where the row stands."""
    least = tl.program_id(0).to(tl.int64) * BLOCK
    start = tl.zeros([BLOCK], tl.int64)
    stop = tl.zeros([BLOCK], tl.int64)
    shift = tl.zeros([BLOCK], tl.int64)
    found = tl.zeros([BLOCK], tl.int32)
    q_done = least * 0
    k_done = least * 0
    for at in tl.range(0, t, DOCUMENTS):
        document = at + tl.arange(0, DOCUMENTS)
        there = document < t
        q_length = tl.load(q_lengths + s * q_b + document * q_s, mask=there, other=0).to(tl.int64)
        k_length = tl.load(k_lengths + s * k_b + document * k_s, mask=there, other=0).to(tl.int64)
        q_sum = tl.sum(q_length, 0)
        # One document of all holds a row: of tiles that do not reach into the block, none.
        if (q_done < least + BLOCK) & (q_done + q_sum > least):
            q_stop = q_done + tl.cumsum(q_length, 0)
            k_stop = k_done + tl.cumsum(k_length, 0)
            holds = (q_stop - q_length)[None, :] <= row[:, None]
            holds = holds & (row[:, None] < q_stop[None, :])  # [BLOCK, DOCUMENTS]
            found += tl.sum(holds.to(tl.int32), 1)
            start += tl.sum(tl.where(holds, (k_stop - k_length)[None, :], 0), 1)
            stop += tl.sum(tl.where(holds, k_stop[None, :], 0), 1)
            shift += tl.sum(tl.where(holds, (k_stop - q_stop)[None, :], 0), 1)
        q_done += q_sum
        k_done += tl.sum(k_length, 0)
    # Rows past the last document are in an empty one, at the end.
    start = tl.where(found > 0, start, k_done)
    stop = tl.where(found > 0, stop, k_done)
    shift = tl.where(found > 0, shift, k_done - m)
    return start, stop, row + shift


@triton.jit
def within_chunk(first, last, start, i, size):
    """Leave of a row's keys its own chunk's; i, which counts from ``start``, may be negative."""
    chunk = start + tl.where(i < 0, -((size - 1 - i) // size), i // size) * size
    return tl.maximum(first, chunk), tl.minimum(last, chunk + size)


@planned
@triton.jit(
    do_not_specialize=[
        "m", "n", "t", "q_s", "q_b", "k_s", "k_b", "lengths_s", "offsets_s", "position", "k_offset",
        "low", "high", "prefix", "chunk", "chunk_too",
    ],
    do_not_specialize_on_alignment=["q_lengths", "k_lengths", "lengths", "offsets"],
)  # fmt: skip
def rows_kernel(
    q_lengths, k_lengths, lengths, offsets, rows, m, n, t, q_s, q_b, k_s, k_b, lengths_s, offsets_s, position, k_offset,
    low, high, prefix, chunk, chunk_too,
    PACKED: tl.constexpr, LENGTHS: tl.constexpr, OFFSETS: tl.constexpr, PLACED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PREFIX: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Write first, last, base and position of a block of rows of one sequence.

    PACKED: whether rows lie in documents. LENGTHS, OFFSETS: whether these are tensors. PLACED: whether one position
    serves all. LOW, HIGH, PREFIX: whether rows end there. CHUNKS: how many sizes of chunks there are.
    """
    s = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.zeros([BLOCK], tl.int64)
    stop = start + n + k_offset
    if LENGTHS:
        stop = start + tl.load(lengths + s * lengths_s).to(tl.int64)
    stands = stop - m + row
    if OFFSETS:
        stands = row + tl.load(offsets + s * offsets_s).to(tl.int64)
    elif PLACED:
        stands = row + position
    if PACKED:
        start, stop, stands = documents_of(row, s, q_lengths, k_lengths, m, t, q_s, q_b, k_s, k_b, BLOCK, DOCUMENTS)
    first = start
    last = stop
    if LOW:
        first = tl.maximum(first, stands + low)
    if HIGH:
        last = tl.minimum(last, stands + high)
    if PREFIX:
        last = tl.minimum(last, tl.maximum(stands + 1, start + prefix))
    if CHUNKS > 0:
        first, last = within_chunk(first, last, start, stands - start, chunk)
    if CHUNKS > 1:
        first, last = within_chunk(first, last, start, stands - start, chunk_too)
    first = tl.minimum(tl.maximum(tl.minimum(first, stop) - k_offset, 0), n)
    last = tl.minimum(tl.maximum(tl.maximum(last, start) - k_offset, 0), n)
    base = tl.minimum(tl.maximum(start - k_offset, -1073741824), 1073741824)
    stands = tl.minimum(tl.maximum(stands - k_offset, -1073741824), 1073741824)
    exists = row < m
    size = tl.num_programs(1).to(tl.int64) * m
    at = rows + s * m + row
    tl.store(at, first.to(tl.int32), mask=exists)
    tl.store(at + size, last.to(tl.int32), mask=exists)
    tl.store(at + 2 * size, base.to(tl.int32), mask=exists)
    tl.store(at + 3 * size, stands.to(tl.int32), mask=exists)


class Rows(NamedTuple):
    """How bounds of rows were lowered, to be done again with other lengths, or for other sizes."""

    bound: Bound
    b: int
    m: int
    like: Tensor

    def resized(self, sees: Reach, m: int, n: int, given: Given, offsets: Tensor | int | None, k_offset: int) -> "Rows":
        """Lower for other sizes."""
        numbers = numbers_of(sees, m, n, *dense(self.like.device, given, offsets), k_offset)
        return Rows(self.bound.resized((-(-m // BLOCK), self.b), numbers), self.b, m, self.like)

    def __call__(self, given: Given, offsets: Tensor | int | None) -> tuple[None, Tensor] | None:
        """Lower; None if it cannot be repeated. No sequences, and rows."""
        rows = self.like.new_empty((4, self.b, self.m))
        given, offsets = moved(rows.device, given, offsets)  # kept until all is launched
        launched = self.bound(
            *(0 if x is None else x.data_ptr() for x in (given.q_lengths, given.k_lengths, given.lengths)),
            offsets.data_ptr() if isinstance(offsets, Tensor) else 0, rows.data_ptr(),
        )  # fmt: skip
        return (None, rows) if launched else None


def dense(device: torch.device, given: Given, offsets: Tensor | int | None) -> tuple[Given, Tensor | int | None]:
    """Lay out what lies elsewhere as it will when it was moved: only then are strides what they were."""
    found = [x.contiguous() if isinstance(x, Tensor) and x.device != device else x for x in (*given, offsets)]
    return Given(*found[:3]), found[3]


def moved(device: torch.device, given: Given, offsets: Tensor | int | None) -> tuple[Given, Tensor | int | None]:
    """Take tensors to where rows are wanted, laid out as `dense` says."""
    given, offsets = dense(device, given, offsets)
    found = [x.to(device) if isinstance(x, Tensor) else x for x in (*given, offsets)]
    return Given(*found[:3]), found[3]


def numbers_of(
    sees: Reach, m: int, n: int, given: Given, offsets: Tensor | int | None, k_offset: int
) -> tuple[int, ...]:
    """What the kernel takes after addresses."""
    t, of_documents = 0, (0, 0, 0, 0)
    if given.q_lengths is not None and given.k_lengths is not None:
        t, of_documents = given.q_lengths.shape[-1], (*steps(given.q_lengths), *steps(given.k_lengths))
    return (
        m, n, t, *of_documents, 0 if given.lengths is None else given.lengths.stride(0),
        offsets.stride(0) if isinstance(offsets, Tensor) else 0, offsets if isinstance(offsets, int) else 0, k_offset,
        sees.low or 0, sees.high or 0, sees.prefix or 0, *(*sees.chunks, 1, 1)[:CHUNKS],
    )  # fmt: skip


def steps(x: Tensor) -> tuple[int, int]:
    """Strides from document to document, and from sequence to sequence; 0 where one row serves all."""
    return x.stride(-1), x.stride(0) if x.ndim > 1 else 0


def lower_rows(
    sees: Reach, rows: Tensor, n: int, given: Given, offsets: Tensor | int | None, k_offset: int
) -> Rows | None:
    """Fill int32 [4, b, m], see `reach.Lowered`; say how to do it again."""
    _, b, m = rows.shape
    if b * m == 0:
        return None
    given, offsets = moved(rows.device, given, offsets)
    bound = rows_kernel[(-(-m // BLOCK), b)](
        given.q_lengths, given.k_lengths, given.lengths, offsets if isinstance(offsets, Tensor) else None, rows,
        *numbers_of(sees, m, n, given, offsets, k_offset),
        PACKED=given.q_lengths is not None, LENGTHS=given.lengths is not None, OFFSETS=isinstance(offsets, Tensor),
        PLACED=isinstance(offsets, int), LOW=sees.low is not None, HIGH=sees.high is not None,
        PREFIX=sees.prefix is not None, CHUNKS=len(sees.chunks), BLOCK=BLOCK, DOCUMENTS=DOCUMENTS, num_warps=4,
    )  # fmt: skip
    return None if bound is None else Rows(bound, b, m, rows.new_empty(0))
