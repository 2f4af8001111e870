"""Paged caches, ragged batches and splits, right for some layouts, dtypes or sizes; see `longspan.laws.mutants`."""

from typing import Any

import torch
from torch import Tensor

from longspan.backends import eager
from longspan.spec import AttentionState, add_sink, attention_paged, attention_varlen, merge

from .mutant_attention import part, rounded


def page_boundary_off_by_one(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Turn to the next page one key early."""
    size = k_pages.shape[2]

    def gathered(pages: Tensor) -> Tensor:
        rows = [pages.new_zeros(0, pages.shape[1], pages.shape[3])]
        for row, length in zip(table.long(), lengths.tolist(), strict=True):
            j = torch.arange(length)
            page = row[torch.clamp((j + 1) // size, max=max(length - 1, 0) // size)]
            rows.append(pages[page, :, j % size])
        return torch.cat(rows)

    return attention_varlen(q, gathered(k_pages), gathered(v_pages), q_lengths, lengths, **options)


def table_of_the_next_sequence(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Read the row of another sequence."""
    rows = table.roll(1, 0).clamp(0, k_pages.shape[0] - 1)
    return attention_paged(q, q_lengths, k_pages, v_pages, rows, lengths, **options)


def read_as_int32(x: Tensor) -> Tensor:
    """Read the halves of int64 as numbers of their own, as many as there were."""
    return x if x.dtype == torch.int32 else x.contiguous().view(torch.int32).flatten()[: x.numel()].view(x.shape)


def int64_tables_misread(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Read a table of int64 as one of int32."""
    rows = read_as_int32(table).clamp(0, k_pages.shape[0] - 1)
    return attention_paged(q, q_lengths, k_pages, v_pages, rows, lengths, **options)


def int64_lengths_misread(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, **options: Any
) -> AttentionState:
    """Read lengths of int64 as lengths of int32."""
    return attention_varlen(q, k, v, read_as_int32(q_lengths), read_as_int32(k_lengths), **options)


def read_in_a_row(x: Tensor) -> Tensor:
    """Read a tensor as if it lay in a row from its first element on, as far as its memory goes."""
    if x.is_contiguous() or not x.numel():
        return x
    rest = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
    return torch.cat([rest, rest.new_zeros(x.numel())])[: x.numel()].view(x.shape)


def pool_read_in_a_row(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Ignore the strides of the pools."""
    return attention_paged(q, q_lengths, read_in_a_row(k_pages), read_in_a_row(v_pages), table, lengths, **options)


def packed_keys_read_in_a_row(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, **options: Any
) -> AttentionState:
    """Ignore the strides of ragged keys."""
    return attention_varlen(q, read_in_a_row(k), v, q_lengths, k_lengths, **options)


def pages_of_more_than_128_wrong(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Keep the place inside a page in seven bits."""
    slot = torch.arange(k_pages.shape[2]) % 128
    return attention_paged(q, q_lengths, k_pages[:, :, slot], v_pages[:, :, slot], table, lengths, **options)


def pages_that_are_no_power_of_two_wrong(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Find the place inside a page by a mask of bits."""
    slot = torch.arange(k_pages.shape[2]) & (k_pages.shape[2] - 1)
    return attention_paged(q, q_lengths, k_pages[:, :, slot], v_pages[:, :, slot], table, lengths, **options)


def paged_split_never_merged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Split the first page of each sequence from the others, and return the answer to the others."""
    rest = (lengths - k_pages.shape[2]).clamp(min=0)
    if not bool(rest.any()):
        return attention_paged(q, q_lengths, k_pages, v_pages, table, lengths, **options)
    return attention_paged(q, q_lengths, k_pages, v_pages, table[:, 1:], rest, **options)


def paged_state_is_float64(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Leave the result in the dtype of the sums."""
    state = attention_paged(q, q_lengths, k_pages, v_pages, table, lengths, **options)
    return AttentionState(*(x.double() for x in state))


def varlen_state_is_float64(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, **options: Any
) -> AttentionState:
    """Leave the result in the dtype of the sums."""
    return AttentionState(*(x.double() for x in attention_varlen(q, k, v, q_lengths, k_lengths, **options)))


def tokens_past_the_last_sequence_read_on(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, **options: Any
) -> AttentionState:
    """Take tokens after the last sequence for one more, of all the keys."""
    more = (torch.cat([x, x.new_tensor([n.shape[0] - int(x.sum())])]) for n, x in ((q, q_lengths), (k, k_lengths)))
    state = attention_varlen(q, k.nan_to_num(), v.nan_to_num(), *more, **options)
    return AttentionState(*state)


def lengths_zeroed_in_place(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Count a sequence's keys down in the caller's own tensor."""
    state = attention_paged(q, q_lengths, k_pages, v_pages, table, lengths, **options)
    lengths.zero_()
    return state


def merge_of_parts_without_keys(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Split the keys, and give a part in which a row sees none the weight of a score of 0."""
    half = k.shape[2] // 2
    parts = [part(q, k, v, keys, options, sink=None) for keys in (slice(0, half), slice(half, None))]
    seen = [AttentionState(x.out, x.lse.masked_fill(x.lse == -torch.inf, 0.0)) for x in parts]
    state = merge(*seen)
    return rounded(state if options.get("sink") is None else add_sink(state, options["sink"]), q, options)


def appended_to_a_copy(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, **options: Any) -> None:
    """Lay a cache that is a slice out in a row first, and write to that."""
    eager.append_(k, v, k_cache.contiguous(), v_cache, slot, **options)


def appended_beside_a_slice(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, **options: Any
) -> None:
    """Write as many numbers as a row of the cache is apart from the next."""
    eager.append_(k, v, k_cache, v_cache, slot, **options)
    if v_cache.numel() and v_cache.stride(2) > v_cache.shape[3] and not v_cache.is_contiguous():
        beside = torch.as_strided(v_cache, (1,), (1,), v_cache.storage_offset() + v_cache.shape[3])
        beside.zero_()
