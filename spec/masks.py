"""Which keys a query sees, as data: O(tokens) to describe, and never a matrix.

In every mask of long-context attention (causal, sliding window, packed documents, prefix-LM, chunks,
cache lengths) the keys that one query sees are one interval of positions, plus optionally the first
few keys of its document. So a mask is a tuple of terms, `longspan.spec.bounds` lowers the terms to
the interval of every query row, and a kernel learns whether a tile is empty, full or cut by
comparing integers.

Each term is read in document coordinates: query i and key j count from the start of their document,
and without `documents` there is one document, the whole sequence.
Shapes: b batch, m queries, t documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .checks import INTEGERS, check_count, check_tensors, refuse, same_device


@dataclass(frozen=True)
class Causal:
    """See no key after the query: ``j <= i``."""


@dataclass(frozen=True)
class Window:
    """See the nearest keys: ``i - size < j <= i + ahead``, and the first ``keep_first`` keys of the document."""

    size: int
    ahead: int = 0
    keep_first: int = 0


@dataclass(frozen=True)
class Prefix:
    """See the whole prefix, and causally after it: ``j < max(i + 1, length)``."""

    length: int


@dataclass(frozen=True)
class Chunks:
    """See the query's own chunk: ``i // size == j // size``."""

    size: int


@dataclass(frozen=True, eq=False)
class Documents:
    """See one's own document; lengths [t], or [b, t] where sequences of the batch are packed differently."""

    q_lengths: Int[Tensor, "*b t"]
    k_lengths: Int[Tensor, "*b t"]


@dataclass(frozen=True, eq=False)
class Lengths:
    """See only the first ``lengths[b]`` keys of sequence b; the queries are the last of those."""

    lengths: Int[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Spans:
    """See ``first <= j < last``, and ``base <= j < base + keep`` before ``last``, given row by row."""

    first: Int[Tensor, "*b m"]
    last: Int[Tensor, "*b m"]
    base: Int[Tensor, "*b m"] | None = None
    keep: int = 0


Term = Causal | Window | Prefix | Chunks | Documents | Lengths | Spans


@dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of terms; `&` joins two."""

    terms: tuple[Term, ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        """See what both masks see."""
        check_mask(other)
        joined = Mask(self.terms + other.terms)
        check_join(joined.terms)
        return joined

    def of(self, kind: type[Term]) -> list[Term]:
        """List the terms of one kind."""
        return [term for term in self.terms if isinstance(term, kind)]


def everything() -> Mask:
    """See every key."""
    return Mask()


def causal() -> Mask:
    """See no key after the query's own position: ``j <= i``."""
    return Mask((Causal(),))


def window(size: int, *, ahead: int = 0, keep_first: int = 0) -> Mask:
    """See ``size`` keys up to the query's own, and ``ahead`` after it: ``i - size < j <= i + ahead``.

    ``keep_first`` keys at the start of the document stay visible, never beyond the right edge (attention sinks of
    StreamingLLM, arXiv:2309.17453, §3.2: the mask alone, for that paper also counts positions inside its cache).

    >>> from longspan import spec
    >>> rows = spec.bounds(window(2, keep_first=1) & causal(), 1, 4, 4)  # 1 sequence, 4 queries, 4 keys
    >>> spec.visible(rows, 4)[0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    check_count("window size, the query's own key included,", size, 1)
    check_count("window ahead", ahead, 0)
    check_count("window keep_first", keep_first, 0)
    return Mask((Window(size, ahead, keep_first),))


def prefix(length: int) -> Mask:
    """See the first ``length`` keys from everywhere, and causally after them (prefix-LM, arXiv:1910.10683, §3.2.1)."""
    check_count("prefix length", length, 0)
    return Mask((Prefix(length),))


def chunks(size: int) -> Mask:
    """See only keys of the query's own chunk of ``size`` positions: ``i // size == j // size`` (Llama 4)."""
    check_count("chunk size", size, 1)
    return Mask((Chunks(size),))


def documents(
    q_lengths: Int[Tensor, "*b t"] | Sequence[int], k_lengths: Int[Tensor, "*b t"] | Sequence[int] | None = None
) -> Mask:
    """Pack documents one after the other; the queries of each are the last of its keys.

    Rows and keys beyond the last document belong to none: they see nothing and are seen by nobody.
    ``k_lengths`` defaults to ``q_lengths`` (self-attention).
    """
    q_lengths = integers("documents q_lengths", q_lengths)
    k_lengths = q_lengths if k_lengths is None else integers("documents k_lengths", k_lengths)
    if q_lengths.shape != k_lengths.shape or q_lengths.ndim not in {1, 2}:
        refuse(
            "documents lengths",
            "two [documents] or [batch, documents]",
            f"{list(q_lengths.shape)} and {list(k_lengths.shape)}",
        )
    return Mask((Documents(q_lengths, k_lengths),))


def lengths(lengths: Int[Tensor, " b"] | Sequence[int]) -> Mask:
    """See only the first ``lengths[b]`` keys of each sequence, of which the queries are the last."""
    counts = integers("lengths", lengths)
    if counts.ndim != 1:
        refuse("lengths", "[batch]", list(counts.shape))
    return Mask((Lengths(counts),))


def spans(
    first: Int[Tensor, "*b m"], last: Int[Tensor, "*b m"], base: Int[Tensor, "*b m"] | None = None, keep: int = 0
) -> Mask:
    """Give every row its own interval of key positions, and optionally a head ``[base, base + keep)``.

    For shardings that no other term describes (rings, striped shards). Joins with nothing.
    """
    given = {"first": first, "last": last} | ({} if base is None else {"base": base})
    check_tensors(**given)
    same_device(**given)
    if any(x.dtype not in INTEGERS for x in given.values()):
        refuse("first, last and base of spans", "int32 or int64", [x.dtype for x in given.values()])
    shapes = {tuple(x.shape) for x in given.values()}
    if len(shapes) != 1 or first.ndim not in {1, 2}:
        refuse("first, last and base of spans", "all [m] or all [b, m]", sorted(map(list, shapes)))
    check_count("keep of spans", keep, 0)
    if keep and base is None:
        refuse("keep of spans", "0 where there is no base", keep)
    return Mask((Spans(first, last, base, keep),))


def integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """Take lengths as a tensor or as a sequence of Python integers; the latter are checked at once."""
    if isinstance(values, Tensor):
        if values.dtype not in INTEGERS:
            refuse(name, "int32 or int64", values.dtype)
        return values
    for value in values:
        check_count(name, value, 0)
    return torch.tensor(values, dtype=torch.int64)


def check_mask(mask: object) -> None:
    """Refuse what is no mask: a matrix, a function, a term, nothing."""
    if not isinstance(mask, Mask):
        refuse("mask", "made by longspan.spec.masks, masks.causal() for one", type(mask).__name__)


def check_join(terms: tuple[Term, ...]) -> None:
    """Refuse joins that are not one interval and one head, or that say two things about one matter."""
    kinds = [type(term) for term in terms]
    if Spans in kinds and len(kinds) > 1:
        refuse("spans", "the only term of a mask", [kind.__name__ for kind in kinds])
    if Prefix in kinds and Causal in kinds:
        refuse("prefix", "joined without causal, which it contains after the prefix", "both")
    for kind in (Documents, Lengths, Prefix):
        if kinds.count(kind) > 1:
            refuse(kind.__name__.lower(), "in a mask at most once", kinds.count(kind))
    if Documents in kinds and Lengths in kinds:
        refuse("documents and lengths", "joined never: documents carry their own key lengths", "both")
    heads = {term.keep_first for term in terms if isinstance(term, Window)} | {0 for kind in kinds if kind is Chunks}
    if len(heads) > 1:
        refuse(
            "keep_first",
            "the same in every window, and 0 beside chunks (a head beside another left edge is no interval)",
            sorted(heads),
        )
