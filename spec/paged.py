"""Attention over a paged cache (PagedAttention, Kwon et al. 2023, arXiv:2309.06180, §4.1): by definition, gathered.

A cache is a pool of pages of equally many tokens; a sequence's keys are the pages that its row of the
block table names, in order, up to its length.
Shapes: tokens of all sequences' queries together, b sequences, t pages of the longest, h query heads, g key heads.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_lengths, check_pages, check_ragged, refuse
from .masks import Mask, everything
from .state import AttentionState
from .varlen import attention_varlen


def attention_paged(
    q: Float[Tensor, "m h d"],
    q_lengths: Int[Tensor, " b"],
    k_pages: Float[Tensor, "pages g page d"],
    v_pages: Float[Tensor, "pages g page e"],
    table: Int[Tensor, "b t"],
    lengths: Int[Tensor, " b"],
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> AttentionState:
    """Attend from ragged queries to the first ``lengths[b]`` keys of each sequence's pages.

    Args:
        q: Queries of all sequences, one after the other; each sequence's are the last of its keys.
        q_lengths: Queries of each sequence.
        k_pages: Pool of key pages.
        v_pages: Pool of value pages.
        table: Pages of each sequence; entries past its length are not read, and may be anything.
        lengths: Keys of each sequence.
        mask: See `attention`, as for the rest; positions count from the start of each sequence.
        scale: See `attention`.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        out_dtype: See `attention`.
        deterministic: See `attention`.

    Returns:
        ``out [tokens, h, e]`` and ``lse [tokens, h]``.

    Raises:
        ValueError: For a table that does not fit the lengths or the pool, and as `attention`.
    """
    check_ragged(q=q)
    check_lengths(q_lengths=q_lengths, lengths=lengths)
    check_pages(k_pages, v_pages, table, lengths)
    return attention_varlen(
        q, gather(k_pages, table, lengths), gather(v_pages, table, lengths), q_lengths, lengths,
        mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi, out_dtype=out_dtype,
        deterministic=deterministic,
    )  # fmt: skip


def gather(
    pages: Float[Tensor, "pages g page d"], table: Int[Tensor, "b t"], lengths: Int[Tensor, " b"]
) -> Float[Tensor, "n g d"]:
    """Lay the pages of every sequence out as ragged tokens.

    Raises:
        ValueError: For a length that its row of the table cannot hold, or a page that the pool lacks.
    """
    size, counts = pages.shape[2], [int(length) for length in lengths]
    if any(not 0 <= count <= table.shape[1] * size for count in counts):
        refuse("lengths", f"0 to {table.shape[1] * size}, what {table.shape[1]} pages of {size} hold", counts)
    used = [row[: -(-count // size)] for row, count in zip(table.to(torch.int64), counts, strict=True)]
    if any(bool(((row < 0) | (row >= pages.shape[0])).any()) for row in used):
        refuse("table", f"0 to {pages.shape[0] - 1}, the pages of the pool, inside the lengths", table)
    sequences = [
        rearrange(pages[row], "t g page d -> (t page) g d")[:count] for row, count in zip(used, counts, strict=True)
    ]
    return torch.cat(sequences) if sequences else rearrange(pages[:0], "t g page d -> (t page) g d")
