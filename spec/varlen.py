"""Attention over ragged batches without padding: by definition, packed documents.

Shapes: tokens of all sequences together, b sequences, h query heads, g key heads, d head dimension, e value dimension.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .attention import attention
from .checks import check_lengths, check_ragged
from .masks import Mask, documents, everything
from .state import AttentionState


def attention_varlen(
    q: Float[Tensor, "m h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g e"],
    q_lengths: Int[Tensor, " b"],
    k_lengths: Int[Tensor, " b"],
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> AttentionState:
    """Attend within each sequence; its queries are the last of its keys.

    Args:
        q: Queries of all sequences, one after the other.
        k: Keys of all sequences.
        v: Values of all sequences.
        q_lengths: Queries of each sequence. Rows past their sum see nothing.
        k_lengths: Keys of each sequence. Keys past their sum are seen by nobody.
        mask: Joined to the documents; positions count from the start of each sequence.
        scale: See `attention`, as for the rest.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        out_dtype: See `attention`.
        deterministic: See `attention`.

    Returns:
        ``out [tokens, h, e]`` and ``lse [tokens, h]``.

    Raises:
        ValueError: For lengths that are not one integer per sequence, and as `attention`.
    """
    check_ragged(q=q, k=k, v=v)
    check_lengths(q_lengths=q_lengths, k_lengths=k_lengths)
    state = attention(
        *(rearrange(x, "tokens heads d -> 1 heads tokens d") for x in (q, k, v)),
        mask=documents(q_lengths, k_lengths) & mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        out_dtype=out_dtype, deterministic=deterministic,
    )  # fmt: skip
    return AttentionState(
        rearrange(state.out, "1 heads tokens e -> tokens heads e"),
        rearrange(state.lse, "1 heads tokens -> tokens heads"),
    )
