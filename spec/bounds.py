"""What a mask means: the interval of keys that each query row sees.

Shapes: b batch, m queries, n keys, t documents. Positions count from the start of the sequence; the
keys given begin at position ``k_offset``, and `Bounds` counts keys from the first one given.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from .checks import refuse
from .masks import Causal, Chunks, Documents, Lengths, Mask, Prefix, Spans, Term, Window, check_mask


class Bounds(NamedTuple):
    """A mask, row by row: key j is seen iff ``first <= j < last`` or ``base <= j < min(base + keep, last)``.

    ``position`` is where the query itself stands among the keys (ALiBi measures distance from there).
    """

    first: Int64[Tensor, "b m"]
    last: Int64[Tensor, "b m"]
    base: Int64[Tensor, "b m"]
    keep: int
    position: Int64[Tensor, "b m"]


class Rows(NamedTuple):
    """Each query row's document: the positions where its keys start and stop, and where the row stands."""

    start: Int64[Tensor, "b m"]
    stop: Int64[Tensor, "b m"]
    position: Int64[Tensor, "b m"]


def bounds(
    mask: Mask,
    b: int,
    m: int,
    n: int,
    *,
    q_offset: int | Int[Tensor, " b"] | None = None,
    k_offset: int = 0,
    device: torch.device | str | None = None,
) -> Bounds:
    """Lower a mask to what every query row sees.

    Bounds of all masks but `spans` are nondecreasing along the rows of a sequence, empty rows included.

    Args:
        mask: The terms.
        b: Sequences in the batch.
        m: Queries of each.
        n: Keys given of each.
        q_offset: Position of the first query; by default the queries are the last of the keys.
        k_offset: Position of the first key given: a slice of the keys keeps its coordinates.
        device: Where the bounds are made.

    Raises:
        ValueError: For lengths, documents or spans that do not fit the batch or the queries.
    """
    check_fit(mask, b, m, q_offset)
    row = rows(mask, b, m, k_offset + n, q_offset, device)
    keep = max([term.keep_first for term in mask.terms if isinstance(term, Window)], default=0)
    first, last, base = row.start, row.stop, row.start
    for term in mask.terms:
        if isinstance(term, Spans):
            last = per_row(term.last, b, m).to(last.device)
            first = torch.minimum(per_row(term.first, b, m).to(last.device), last)
            base, keep = first if term.base is None else per_row(term.base, b, m).to(last.device), term.keep
        else:
            low, high = edges(term, row.position - row.start, row.stop - row.start)
            first = torch.maximum(first, row.start + low)
            last = torch.minimum(last, row.start + high)
    return Bounds(
        first=torch.minimum(first, row.stop).sub(k_offset).clamp(0, n),
        last=torch.maximum(last, row.start).sub(k_offset).clamp(0, n),
        base=base - k_offset,
        keep=keep,
        position=row.position - k_offset,
    )


def edges(
    term: Term, i: Int64[Tensor, "b m"], length: Int64[Tensor, "b m"]
) -> tuple[Int64[Tensor, "b m"], Int64[Tensor, "b m"]]:
    """Say what one term shows query i of a document of ``length`` keys: ``low <= j < high``."""
    match term:
        case Causal():
            return torch.zeros_like(i), i + 1
        case Window(size, ahead):
            return i - size + 1, i + ahead + 1
        case Prefix(head):
            return torch.zeros_like(i), (i + 1).clamp(min=head)
        case Chunks(size):
            chunk = i.div(size, rounding_mode="floor")
            return chunk * size, chunk * size + size
        case _:
            return torch.zeros_like(i), length


def rows(
    mask: Mask, b: int, m: int, end: int, q_offset: int | Int[Tensor, " b"] | None, device: torch.device | str | None
) -> Rows:
    """Place every query row: in its document, or in the one sequence of keys ``[0, end)``."""
    row = repeat(torch.arange(m, device=device), "m -> b m", b=b)
    for term in mask.terms:
        if isinstance(term, Documents):
            return document_rows(term, row)
    stop = torch.full_like(row, end)
    for term in mask.terms:
        if isinstance(term, Lengths):
            stop = torch.zeros_like(row) + rearrange(term.lengths.to(row.device, torch.int64), "b -> b 1")
    if q_offset is None:
        return Rows(torch.zeros_like(row), stop, stop - m + row)
    offset = rearrange(q_offset.to(torch.int64), "b -> b 1") if isinstance(q_offset, Tensor) else q_offset
    return Rows(torch.zeros_like(row), stop, row + offset)


def document_rows(term: Documents, row: Int64[Tensor, "b m"]) -> Rows:
    """Find each row's document, whose queries are the last of its keys; rows past the last find an empty one."""
    b = row.shape[0]
    q_length = per_row(term.q_lengths, b, term.q_lengths.shape[-1]).to(row.device)
    k_length = per_row(term.k_lengths, b, term.k_lengths.shape[-1]).to(row.device)
    q_stop, k_stop = q_length.cumsum(-1), k_length.cumsum(-1)
    # searchsorted counts the documents that have ended at or before a row, so empty documents are stepped over.
    document = torch.searchsorted(q_stop.contiguous(), row.contiguous(), right=True)
    last = k_stop[:, -1:] if k_stop.shape[-1] else torch.zeros_like(k_length.sum(-1, keepdim=True))
    start = torch.cat([k_stop - k_length, last], -1).gather(-1, document)
    stop = torch.cat([k_stop, last], -1).gather(-1, document)
    # Bottom-right: the last query of a document stands on its last key.
    shift = torch.cat([k_stop - q_stop, last - row.shape[-1]], -1).gather(-1, document)
    return Rows(start, stop, row + shift)


def visible(bounds: Bounds, n: int) -> Bool[Tensor, "b m n"]:
    """Write the bounds out as a matrix, which only a definition can afford."""
    key = torch.arange(n, device=bounds.first.device)
    first, last, base = (rearrange(x, "b m -> b m 1") for x in (bounds.first, bounds.last, bounds.base))
    body = (first <= key) & (key < last)
    head = (base <= key) & (key < base + bounds.keep) & (key < last)
    return body | head


def per_row(values: Int[Tensor, "*b m"], b: int, m: int) -> Int64[Tensor, "b m"]:
    """Read values given once for all sequences, or one row a sequence, as one row a sequence."""
    return values.to(torch.int64).expand(b, m)


def check_fit(mask: Mask, b: int, m: int, q_offset: int | Tensor | None) -> None:
    """Refuse what is no mask, and terms whose tensors were made for another batch or another number of queries."""
    check_mask(mask)
    for term in mask.terms:
        match term:
            case Lengths(lengths) if list(lengths.shape) != [b]:
                refuse("lengths", f"[{b}], one per sequence", list(lengths.shape))
            case Documents(q_lengths) if q_lengths.ndim > 1 and q_lengths.shape[0] != b:
                refuse("documents lengths", f"[documents] or [{b}, documents]", list(q_lengths.shape))
            case Documents() if q_offset is not None:
                refuse("q_offset", "None beside documents, which place their own queries", q_offset)
            case Spans(first) if list(first.shape) not in ([m], [1, m], [b, m]):
                refuse("spans", f"[{m}] or [{b}, {m}]", list(first.shape))
            case _:
                pass
