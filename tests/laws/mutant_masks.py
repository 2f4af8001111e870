"""Attention that reads its mask or its offsets in a wrong way; see `longspan.laws.mutants`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longspan.spec import AttentionState, attention, bounds, masks
from longspan.spec.masks import Causal, Chunks, Documents, Lengths, Mask, Term, Window


def each(mask: Mask, change: Callable[[Any], Term | None]) -> Mask:
    """Change or drop the terms of a mask."""
    changed = (change(term) for term in mask.terms)
    return Mask(tuple(term for term in changed if term is not None))


def placed(k: Tensor, q: Tensor, options: dict[str, Any]) -> Any:
    """Place the queries where the whole problem has them, so that a part of the keys can be asked alone."""
    mask = options.get("mask", masks.everything())
    if options.get("q_offset") is not None or mask.of(Documents) or mask.of(Lengths):
        return options.get("q_offset")
    return options.get("k_offset", 0) + k.shape[2] - q.shape[2]


def spanned(q: Tensor, k: Tensor, v: Tensor, seen: Any, options: dict[str, Any]) -> AttentionState:
    """Attention with explicit bounds, which count from the first key given."""
    offset = options.get("k_offset", 0)
    mask = masks.spans(seen.first + offset, seen.last + offset, seen.base + offset, seen.keep)
    start = seen.position[:, 0] + offset if q.shape[2] else None
    return attention(q, k, v, mask=mask, **{**options, "q_offset": start})


def window_one_short(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """Read a window as ``size - 1`` keys."""
    short = each(mask, lambda term: replace(term, size=max(term.size - 1, 1)) if isinstance(term, Window) else term)
    return attention(q, k, v, mask=short, **options)


def window_one_long(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """Read a window as ``size`` keys and the query's own."""
    long = each(mask, lambda term: replace(term, size=term.size + 1) if isinstance(term, Window) else term)
    return attention(q, k, v, mask=long, **options)


def windows_ignored(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """See every key where a window was asked for."""
    return attention(q, k, v, mask=each(mask, lambda term: None if isinstance(term, Window) else term), **options)


def causal_from_the_top_left(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let the queries be the first of the keys."""
    framed = options["mask"].of(Documents) or options.get("q_offset") is not None
    return attention(q, k, v, **(options if framed else {**options, "q_offset": options.get("k_offset", 0)}))


def causal_excludes_the_diagonal(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """Hide a query's own key: ``j < i``."""
    if not mask.of(Causal) or mask.of(Documents):
        return attention(q, k, v, mask=mask, **options)
    offset = placed(k, q, {**options, "mask": mask})
    if offset is None:
        return attention(q, k, v, mask=mask, **options)
    return attention(q, k, v, mask=mask, **{**options, "q_offset": offset - 1})


def cut_tile_not_masked(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """See the whole tile of 16 keys that the right edge cuts."""
    seen = bounds(
        mask, q.shape[0], q.shape[2], k.shape[2], q_offset=options.get("q_offset"), k_offset=options.get("k_offset", 0)
    )
    last = (-(-seen.last // 16) * 16).clamp(max=k.shape[2])
    last = torch.where(seen.first < seen.last, last, seen.last)
    return spanned(q, k, v, seen._replace(last=last), options)


def chunks_of_the_batch(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """Count chunks from the start of the packed batch, and not of each document."""
    sizes = [term.size for term in mask.terms if isinstance(term, Chunks)]
    if not sizes or not mask.of(Documents):
        return attention(q, k, v, mask=mask, **options)
    rest = each(mask, lambda term: None if isinstance(term, Chunks) else term)
    seen = bounds(rest, q.shape[0], q.shape[2], k.shape[2], k_offset=options.get("k_offset", 0))
    chunk = seen.position.div(sizes[0], rounding_mode="floor") * sizes[0]
    cut = seen._replace(
        first=torch.maximum(seen.first, chunk).clamp(0, k.shape[2]),
        last=torch.minimum(seen.last, chunk + sizes[0]).clamp(0, k.shape[2]),
    )
    return spanned(q, k, v, cut, options)


def first_keys_forgotten(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """See the window, and not the document's first keys."""
    without = each(mask, lambda term: replace(term, keep_first=0) if isinstance(term, Window) else term)
    return attention(q, k, v, mask=without, **options)


def first_keys_beyond_the_edge(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """See the document's first keys even after the right edge."""
    seen = bounds(
        mask, q.shape[0], q.shape[2], k.shape[2], q_offset=options.get("q_offset"), k_offset=options.get("k_offset", 0)
    )
    head = (seen.base + seen.keep).clamp(0, k.shape[2])
    early = (seen.last < head) & (seen.keep > 0)
    wide = seen._replace(
        first=torch.where(early, seen.base.clamp(0, k.shape[2]), seen.first), last=torch.where(early, head, seen.last)
    )
    return spanned(q, k, v, wide, options)


def documents_leak(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """Ignore the borders of documents."""
    return attention(q, k, v, mask=each(mask, lambda term: None if isinstance(term, Documents) else term), **options)


def lengths_ignored(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """Read every cache to its end."""
    return attention(q, k, v, mask=each(mask, lambda term: None if isinstance(term, Lengths) else term), **options)


def k_offset_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Count keys from the slice's own start."""
    return attention(q, k, v, **{**options, "k_offset": 0})


def q_offset_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let the queries be the last of the keys given, wherever they stand."""
    return attention(q, k, v, **{**options, "q_offset": None})
