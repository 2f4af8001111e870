"""Attention of the backend `flash`: what it serves, what it declines, and the way to the kernels.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from collections.abc import Hashable
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.bounds import check_fit
from longspan.spec.checks import check_attention, check_lengths, check_ragged
from longspan.spec.masks import Mask, documents, everything

from . import decode
from .attending import Attending
from .choices import short
from .function import attend, launch_call
from .kin import LONGEST
from .launch import INTERPRETED, Call
from .plan import memory
from .reach import each_sees
from .rope import DTYPES


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
    deterministic: bool = False,  # noqa: ARG001 - no kernel adds atomically: it always is
) -> AttentionState:
    """Attend from every query to the keys that it sees; see `longspan.spec.attention`.

    Args:
        q: ``[b, h, m, d]`` in fp16, bf16 or fp32, any strides with a unit last one; not copied, as k and v.
        k: ``[b, g, n, d]``.
        v: ``[b, g, n, e]``.
        mask: Which keys a query sees.
        scale: Multiplies ``q · k``; 1/√d by default.
        softcap: Caps the scores.
        sink: One more score per head; has a gradient.
        alibi: Slope per head; has none.
        q_offset: Position of the first query.
        k_offset: Position of the first key given.
        out_dtype: Dtype of ``out``; that of q by default.
        deterministic: The gradient is bitwise repeatable whether asked for or not.

    Returns:
        ``out [b, h, m, e]`` and ``lse [b, h, m]`` float32, contiguous, differentiable both.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention` names.
    """
    return ATTENDING(q, k, v, mask, scale, softcap, sink, alibi, q_offset, k_offset, out_dtype)


def declines_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    mask: Mask = everything(), scale: float | None = None, softcap: float | None = None, sink: Tensor | None = None,  # noqa: B008
    alibi: Tensor | None = None, q_offset: int | Tensor | None = None, k_offset: int = 0,
    out_dtype: torch.dtype | None = None, deterministic: bool = False,  # noqa: ARG001
) -> str | None:  # fmt: skip
    """Say why `attention` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    check_fit(mask, q.shape[0], q.shape[2], q_offset)
    if q.dtype not in DTYPES:
        return f"flash.attention computes in float32 and serves fp16, bf16 and fp32, got {q.dtype}"
    if out_dtype is not None and out_dtype not in DTYPES:
        return f"flash.attention returns fp16, bf16 or fp32, got out_dtype {out_dtype}"
    if not INTERPRETED and q.device.type != "cuda":
        return f"flash.attention runs on a GPU, or on a CPU under TRITON_INTERPRET=1, got tensors on {q.device}"
    if alibi is not None and alibi.requires_grad and torch.is_grad_enabled():
        return "flash.attention has no gradient for alibi, which requires one"
    if alibi is not None and isinstance(q_offset, int) and abs(q_offset - k_offset) + q.shape[2] > LONGEST:
        return f"flash.attention measures ALiBi's distances up to {LONGEST} tokens, got q_offset {q_offset}"
    widest = decode.widest(q, k, v, sink)
    return declines_layout("q", q, widest) or declines_layout("k", k, widest) or declines_layout("v", v, widest)


def declines_layout(name: str, x: Tensor, widest: int) -> str | None:
    """Say why the kernels cannot read a tensor, or None."""
    if x.shape[-1] % 8 or x.shape[-1] > widest:
        return f"flash.attention serves head dimensions in steps of 8 up to {widest}, got {x.shape[-1]} of {name}"
    if x.shape[-2] > LONGEST:
        return f"flash.attention counts at most {LONGEST} tokens, got {x.shape[-2]} of {name}"
    if x.stride(-1) != 1 and x.numel():
        return f"flash.attention reads tensors whose last stride is 1, got strides {list(x.stride())} of {name}"
    return None


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
    """Attend within each sequence of a ragged batch, packed as documents; see `longspan.spec.attention_varlen`.

    Args:
        q: ``[tokens, h, d]``, queries of all sequences; not copied, as k and v.
        k: ``[tokens, g, d]``.
        v: ``[tokens, g, e]``.
        q_lengths: Queries of each sequence.
        k_lengths: Keys of each sequence.
        mask: Joined to the documents.
        scale: See `attention`, as for the rest.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        out_dtype: See `attention`.
        deterministic: See `attention`.

    Returns:
        ``out [tokens, h, e]``, a view of ``[h, tokens, e]``, and ``lse [tokens, h]``.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention_varlen` names.
    """
    check_ragged(q=q, k=k, v=v)
    check_lengths(q_lengths=q_lengths, k_lengths=k_lengths)
    state = attention(
        *map(one_batch, (q, k, v)), mask=documents(q_lengths, k_lengths) & mask, scale=scale, softcap=softcap,
        sink=sink, alibi=alibi, out_dtype=out_dtype, deterministic=deterministic,
    )  # fmt: skip
    return AttentionState(
        rearrange(state.out, "1 heads tokens e -> tokens heads e"),
        rearrange(state.lse, "1 heads tokens -> tokens heads"),
    )


def declines_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, **options: Any
) -> str | None:
    """Say why `attention_varlen` would raise `Unsupported`, or None."""
    check_ragged(q=q, k=k, v=v)
    check_lengths(q_lengths=q_lengths, k_lengths=k_lengths)
    mask = documents(q_lengths, k_lengths) & options.pop("mask", everything())
    return declines_attention(*map(one_batch, (q, k, v)), mask=mask, **options)


def one_batch(x: Tensor) -> Tensor:
    """See ragged tokens as one sequence, without a copy."""
    return rearrange(x, "tokens heads d -> 1 heads tokens d")


def code_of(call: Call, q: Tensor, k: Tensor, _v: Tensor) -> Hashable:
    """All that code and tiles of the forward kernel depend on of a call's sizes; see `growing.form`."""
    return short(k.shape[2]), each_sees(q.shape[2], k.shape[2], *call.interval)


ATTENDING: Final = Attending(Call, declines_attention, launch_call, attend, code_of, ("eager",), memory())
