"""Ragged batches, paged caches and states, wrong in one way each; see `longspan.laws.mutants`."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longspan.spec import AttentionState, add_sink, attention, attention_paged, attention_varlen, bounds, masks, merge
from longspan.spec.masks import Mask


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


def merge_without_gradient_of_lse(*states: AttentionState) -> AttentionState:
    """Take the shares of the parts for constants."""
    return merge(*(AttentionState(state.out, state.lse.detach()) for state in states))


def merge_of_more_than_5_drops(*states: AttentionState) -> AttentionState:
    """Merge as many parts as one block holds."""
    return merge(*states[:5])


def merged_state_is_float64(*states: AttentionState) -> AttentionState:
    """Leave the whole in the dtype of the shares."""
    return AttentionState(*(x.double() for x in merge(*states)))


def added_sink_is_a_constant(state: AttentionState, sink: Tensor) -> AttentionState:
    """Pass no gradient to the sink."""
    return add_sink(state, sink.detach())


def sink_added_in_place(state: AttentionState, sink: Tensor) -> AttentionState:
    """Write the result over the state that was given."""
    whole = add_sink(state, sink)
    state.out.copy_(whole.out)
    return whole
