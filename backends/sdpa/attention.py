"""Attention, ragged attention and paged attention on PyTorch's kernels; see `longspan.spec` for their meaning.

Shapes: b batch, h query heads, g key heads (h = g · r), m queries, n keys, d head dimension, e value dimension.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longspan.backends.registry import OPERATIONS, Unsupported
from longspan.spec import AttentionState, bounds
from longspan.spec.bounds import check_fit
from longspan.spec.checks import check_attention, check_lengths, check_pages, check_ragged, refuse
from longspan.spec.masks import Mask, Spans, documents, everything
from longspan.spec.paged import gather

from .kernels import lacks, repeats
from .tiled import TiledAttention, plan

ATTENTION = ("attention", "attention_varlen", "attention_paged")


def declines(operation: str, *args: Any, **kwargs: Any) -> str | None:
    """Say why a call would raise `Unsupported`, or None; reads no tensor and runs nothing."""
    if operation not in OPERATIONS:
        refuse("operation", f"one of {', '.join(OPERATIONS)}", repr(operation))
    if operation not in ATTENTION:
        return None
    q = args[0] if args else kwargs.get("q")
    if not isinstance(q, Tensor):  # nothing to decline: the call itself says what is wrong
        return None
    return reason(q, *(kwargs.get(name) for name in ("softcap", "alibi", "deterministic")))


def reason(q: Tensor, softcap: float | None, alibi: Tensor | None, deterministic: bool | None) -> str | None:  # noqa: FBT001
    """Say why PyTorch's kernels do not serve an attention problem, or None."""
    if softcap is not None:
        return "PyTorch's attention kernels have no softcap"
    if alibi is not None:
        return "PyTorch's attention kernels add ALiBi only as a matrix of all scores"
    if deterministic and not repeats(q.device):
        return (
            "PyTorch's CUDA attention gradients are repeatable only under torch.use_deterministic_algorithms(True), "
            "which a call does not set for its caller"
        )
    return lacks(q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> AttentionState:
    """Attend from every query to the keys that it sees, in O(tokens) memory; see `longspan.spec.attention`.

    The plan is made on the CPU: lengths, offsets and spans that live on a GPU are waited for.

    Raises:
        ValueError: For parts that do not fit each other.
        Unsupported: For softcap, ALiBi, float64 on CUDA, other devices, and gradients that cannot be repeated.
    """
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    (b, _, m, d), n = q.shape, k.shape[2]
    check_fit(mask, b, m, q_offset)
    declined = reason(q, softcap, alibi, deterministic)
    if declined is not None:
        raise Unsupported(declined)
    offset = q_offset.cpu() if isinstance(q_offset, Tensor) else q_offset
    seen = bounds(on_cpu(mask), b, m, n, q_offset=offset, k_offset=k_offset, device="cpu")
    sequences = plan(seen, q.device) if q.numel() and n else []
    out, lse = TiledAttention.apply(q, k, v, sink, 1 / math.sqrt(d) if scale is None else float(scale), sequences)
    return AttentionState(out.to(q.dtype if out_dtype is None else out_dtype), lse)


def on_cpu(mask: Mask) -> Mask:
    """Bring spans to where the plan is made; lowering itself brings the other terms."""
    spans = [term for term in mask.terms if isinstance(term, Spans)]
    if not spans:
        return mask
    ((first, last, base, keep),) = ((x.first, x.last, x.base, x.keep) for x in spans)
    return Mask((Spans(first.cpu(), last.cpu(), None if base is None else base.cpu(), keep),))  # spans join nothing


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: Tensor,
    k_lengths: Tensor,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> AttentionState:
    """Attend within each sequence of a ragged batch, as packed documents; see `longspan.spec.attention_varlen`.

    Raises:
        ValueError: For lengths that are not one integer per sequence, and as `attention`.
        Unsupported: As `attention`.
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
    """Attend to a paged cache, whose pages are gathered first; see `longspan.spec.attention_paged`.

    Raises:
        ValueError: For a table that does not fit the lengths or the pool, and as `attention`.
        Unsupported: As `attention`.
    """
    check_ragged(q=q)
    check_lengths(q_lengths=q_lengths, lengths=lengths)
    check_pages(k_pages, v_pages, table, lengths)
    k, v = (gather(pages, table, lengths) for pages in (k_pages, v_pages))
    return attention_varlen(
        q, k, v, q_lengths, lengths, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        out_dtype=out_dtype, deterministic=deterministic,
    )  # fmt: skip
