"""Attention, ragged batches, caches and states, each wrong in one way; see `longspan.laws.mutants`."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from longspan.spec import (
    AttentionState,
    add_sink,
    attention,
    attention_paged,
    attention_varlen,
    bounds,
    masks,
    merge,
)
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


def part(q: Tensor, k: Tensor, v: Tensor, keys: slice, options: dict[str, Any], **changed: Any) -> AttentionState:
    """Attention to a slice of the keys, in float32."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    offsets = {"q_offset": placed(k, q, options), "k_offset": options.get("k_offset", 0) + (keys.start or 0)}
    return attention(q, k[:, :, keys], v[:, :, keys], **{**options, **offsets, "out_dtype": wide, **changed})


def rounded(state: AttentionState, q: Tensor, options: dict[str, Any]) -> AttentionState:
    """Give a state the dtype that was asked for."""
    return AttentionState(state.out.to(options.get("out_dtype") or q.dtype), state.lse)


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


def lse_in_base_2(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Return the logarithm to base 2, as kernels keep it."""
    state = attention(q, k, v, **options)
    return AttentionState(state.out, state.lse / math.log(2))


def sink_missing_from_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Count the sink in the denominator and not in the log-sum-exp."""
    return AttentionState(attention(q, k, v, **options).out, attention(q, k, v, **{**options, "sink": None}).lse)


def sink_missing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Ignore the sink."""
    return attention(q, k, v, **{**options, "sink": None})


def sink_in_every_part(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Split the keys, and count the sink once per part."""
    half = k.shape[2] // 2
    parts = (part(q, k, v, keys, options) for keys in (slice(0, half), slice(half, None)))
    return rounded(merge(*parts), q, options)


def softcap_before_scale(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Cap the product, then scale it."""
    scale = options.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    cap = options.get("softcap")
    if cap is None or scale == 0:
        return attention(q, k, v, **options)
    return attention(q, k, v, **{**options, "softcap": cap * abs(scale)})


def tail_tile_dropped(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Read whole tiles of 16 keys only."""
    whole = k.shape[2] - k.shape[2] % 16
    return rounded(part(q, k, v, slice(0, whole), options), q, options)


def split_not_merged(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Split the keys, and return the last part's answer."""
    half = k.shape[2] // 2
    return rounded(part(q, k, v, slice(half, None), options), q, options)


def rescale_forgotten(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Sum under each tile's own peak, without rescaling to the common one."""
    half = k.shape[2] // 2
    first, second = (part(q, k, v, keys, options, sink=None) for keys in (slice(0, half), slice(half, None)))
    state = merge(first, AttentionState(second.out, torch.minimum(second.lse, first.lse + 1)))
    state = state if options.get("sink") is None else add_sink(state, options["sink"])
    return rounded(state, q, options)


def full_tile_skipped(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Take the first tile of 32 keys for an empty one where it is full."""
    if k.shape[2] < 64:
        return attention(q, k, v, **options)
    return rounded(part(q, k, v, slice(32, None), options), q, options)


def cut_tile_not_masked(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> AttentionState:
    """See the whole tile of 16 keys that the right edge cuts."""
    seen = bounds(
        mask, q.shape[0], q.shape[2], k.shape[2], q_offset=options.get("q_offset"), k_offset=options.get("k_offset", 0)
    )
    last = (-(-seen.last // 16) * 16).clamp(max=k.shape[2])
    last = torch.where(seen.first < seen.last, last, seen.last)
    return spanned(q, k, v, seen._replace(last=last), options)


def spanned(q: Tensor, k: Tensor, v: Tensor, seen: Any, options: dict[str, Any]) -> AttentionState:
    """Attention with explicit bounds, which count from the first key given."""
    offset = options.get("k_offset", 0)
    mask = masks.spans(seen.first + offset, seen.last + offset, seen.base + offset, seen.keep)
    start = seen.position[:, 0] + offset if q.shape[2] else None
    return attention(q, k, v, mask=mask, **{**options, "q_offset": start})


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


def scale_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Scale by 1/√d whatever was asked."""
    return attention(q, k, v, **{**options, "scale": None})


def scale_of_the_value_dim(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Scale by the value dimension."""
    return attention(q, k, v, **{**options, "scale": options.get("scale") or 1 / math.sqrt(v.shape[-1])})


def alibi_before_softcap(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Cap ALiBi's distances with the scores: here, lose them altogether beside a cap."""
    capped = options.get("softcap") is not None
    return attention(q, k, v, **{**options, "alibi": None if capped else options.get("alibi")})


def float32_rounded_to_bfloat16(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Compute float32 problems in bfloat16, silently."""
    if q.dtype != torch.float32:
        return attention(q, k, v, **options)
    out_dtype = options.get("out_dtype") or torch.float32
    return attention(*(x.bfloat16() for x in (q, k, v)), **{**options, "out_dtype": out_dtype})


def k_offset_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Count keys from the slice's own start."""
    return attention(q, k, v, **{**options, "k_offset": 0})


def q_offset_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let the queries be the last of the keys given, wherever they stand."""
    return attention(q, k, v, **{**options, "q_offset": None})


def heads_read_the_wrong_group(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let query head c read key head ``c mod g``."""
    r = q.shape[1] // k.shape[1]
    return attention(q, *(repeat(x, "b g n d -> b (r g) n d", r=r) for x in (k, v)), **options)


def blind_rows_are_nan(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Divide by the sum of no weights."""
    state = attention(q, k, v, **options)
    some = (state.lse != -torch.inf).to(state.out.dtype)
    return AttentionState(state.out / rearrange(some, "b h m -> b h m 1"), state.lse)


def blind_rows_see_everything(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Hide keys with a large negative number, which a row of nothing but hidden keys shares evenly."""
    state = attention(q, k, v, **options)
    mean = repeat(v.mean(2), "b g e -> b (g r) 1 e", r=q.shape[1] // k.shape[1]).nan_to_num().to(state.out.dtype)
    blind = rearrange(state.lse == -torch.inf, "b h m -> b h m 1")
    return AttentionState(torch.where(blind, mean, state.out), state.lse)


def blind_rows_have_infinite_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Return lse = +inf where no key is seen."""
    state = attention(q, k, v, **options)
    return AttentionState(state.out, state.lse.masked_fill(state.lse == -torch.inf, torch.inf))


def dead_values_times_zero(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Multiply values that nobody sees by weight zero, and NaN with them."""
    state = attention(q, k, v, **options)
    nothing = repeat((0 * v).sum(2), "b g e -> b (g r) 1 e", r=q.shape[1] // k.shape[1])
    return AttentionState(state.out + nothing.to(state.out.dtype), state.lse)


def order_of_sums_varies() -> Callable[..., AttentionState]:
    """Build a backend that sums in another order at every other call."""
    calls = itertools.count()

    def sums_in_another_order(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
        """Split the keys at another place in every call."""
        cut = next(calls) % 7 % (k.shape[2] + 1)
        parts = [part(q, k, v, keys, options, sink=None) for keys in (slice(0, cut), slice(cut, None))]
        state = merge(*parts)
        state = state if options.get("sink") is None else add_sink(state, options["sink"])
        return rounded(state, q, options)

    return sums_in_another_order


def query_scaled_in_place(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Write to the caller's queries."""
    with torch.no_grad():
        q.detach()[:1].mul_(1.0)
    return attention(q, k, v, **options)


def gradient_of_one_head_of_a_group(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Give keys the gradient of their group's first query head alone."""
    r = q.shape[1] // k.shape[1]
    copies = [rearrange([x, *[x.detach()] * (r - 1)], "r b g n d -> b (g r) n d") for x in (k, v)]
    return attention(q, *copies, **options)


def gradient_of_the_sink_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Treat the sink as a constant."""
    sink = options.get("sink")
    return attention(q, k, v, **{**options, "sink": None if sink is None else sink.detach() + 0 * sink})


class Uncapped(torch.autograd.Function):
    """Forward with the softcap, backward without."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Attend as asked."""
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return attention(q, k, v, **options)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate another function."""
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            state = attention(*leaves, **{**ctx.options, "softcap": None})
        return (*torch.autograd.grad([state.out, state.lse], leaves, [d_out, d_lse]), None)


def gradient_without_softcap(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Forget the cap in the backward pass."""
    if options.get("softcap") is None or options.get("sink") is not None:
        return attention(q, k, v, **options)
    return AttentionState(*Uncapped.apply(q, k, v, options))


def gradient_of_lse_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let no gradient through lse."""
    state = attention(q, k, v, **options)
    return AttentionState(state.out, state.lse.detach() + 0 * state.out.sum(-1))


def varlen_from_the_top_left(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, *, mask: Mask, **options: Any
) -> AttentionState:
    """Let each sequence's queries be the first of its keys."""
    seen = bounds(masks.documents(q_lengths, k_lengths), 1, q.shape[0], k.shape[0])
    rows = torch.repeat_interleave(k_lengths - q_lengths, q_lengths)
    rows = torch.cat([rows, rows.new_zeros(q.shape[0] - rows.shape[0])])
    inner = bounds(masks.documents(q_lengths, k_lengths) & mask, 1, q.shape[0], k.shape[0])
    last = torch.where(inner.last < seen.last, (inner.last - rows).clamp(min=0), inner.last)
    last = torch.minimum(torch.maximum(last, seen.first), seen.last)
    moved = masks.spans(torch.minimum(inner.first, last), last, inner.base, inner.keep)
    state = attention(*(rearrange(x, "t h d -> 1 h t d") for x in (q, k, v)), mask=moved, **options)
    return AttentionState(rearrange(state.out, "1 h t e -> t h e"), rearrange(state.lse, "1 h t -> t h"))


def varlen_is_one_sequence(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, **options: Any
) -> AttentionState:
    """Ignore where sequences end."""
    total = [torch.tensor([x.shape[0]]) for x in (q, k)]
    del q_lengths, k_lengths
    return attention_varlen(q, k, v, *total, **options)


def pages_in_storage_order(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Read pages as they lie, and not as the block table says."""
    count = table.numel()
    in_order = rearrange(torch.arange(count, dtype=table.dtype), "(b t) -> b t", b=table.shape[0])
    return attention_paged(q, q_lengths, k_pages, v_pages, in_order, lengths, **options)


def last_page_read_to_its_end(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Round a sequence's length up to whole pages."""
    size = k_pages.shape[2]
    return attention_paged(q, q_lengths, k_pages, v_pages, table, -(-lengths // size) * size, **options)


def merge_averages(*states: AttentionState) -> AttentionState:
    """Average the parts, whatever their weight."""
    out = torch.stack([state.out for state in states]).mean(0)
    return AttentionState(out, merge(*states).lse)


def merge_in_base_2(*states: AttentionState) -> AttentionState:
    """Read natural logarithms as base 2."""
    squeezed = [AttentionState(state.out, state.lse * math.log(2)) for state in states]
    return AttentionState(merge(*squeezed).out, merge(*states).lse)


def merge_of_nothing_is_nan(*states: AttentionState) -> AttentionState:
    """Weigh parts by a logistic function of their difference, which two empty parts do not have."""
    state = states[0]
    for other in states[1:]:
        share = torch.sigmoid(other.lse - state.lse)
        out = state.out + rearrange(share, "... -> ... 1").to(state.out.dtype) * (other.out - state.out)
        state = AttentionState(out, torch.logaddexp(state.lse, other.lse))
    return state


def merge_keeps_the_first_lse(*states: AttentionState) -> AttentionState:
    """Return the log-sum-exp of the first part."""
    return AttentionState(merge(*states).out, states[0].lse)


def sink_overflows(state: AttentionState, sink: Tensor) -> AttentionState:
    """Add the sink under the scores' own peak, far above which it overflows."""
    more = (rearrange(sink, "h -> h 1") - state.lse).exp()
    out = state.out / rearrange(1 + more, "... -> ... 1").to(state.out.dtype)
    return AttentionState(out, state.lse + (1 + more).log())


def sink_leaves_lse(state: AttentionState, sink: Tensor) -> AttentionState:
    """Count the sink in out alone."""
    return AttentionState(add_sink(state, sink).out, state.lse)
