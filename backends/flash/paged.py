"""Attention over a paged cache (PagedAttention, Kwon et al. 2023, arXiv:2309.06180, §4.1).

Shapes: tokens of all sequences' queries together, b sequences, h query heads, g key heads, d head, e value dimension.
"""

from typing import Any

import torch
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.checks import check_lengths, check_pages, check_ragged
from longspan.spec.masks import Mask, everything

from ..registry import Unsupported


def attention_paged(
    q: Tensor,
    q_lengths: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> AttentionState:
    """Decline: no kernel reads block tables yet, and gathering the pages would be silently slow.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: Always.
    """
    del mask, scale, softcap, sink, alibi, out_dtype, deterministic
    raise Unsupported(
        declines_attention_paged(q, q_lengths, k_pages, v_pages, table, lengths), alternatives=("sdpa", "eager")
    )


def declines_attention_paged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **_: Any
) -> str:
    """Say why `attention_paged` raises `Unsupported`."""
    check_ragged(q=q)
    check_lengths(q_lengths=q_lengths, lengths=lengths)
    check_pages(k_pages, v_pages, table, lengths)
    return "flash.attention_paged is not served: no kernel reads block tables"
