"""Attention of the backend `hopper`: what it serves, what it declines, and the way to the kernels.

Few queries of a long cache, and caches in pages, are at the memory's speed in `flash` already, whose kernels split the
keys over programs and load them by the same copy engine. They are this backend's own, too: it has no others for them.
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

from ..flash import decode, paged
from ..flash.attending import Attending
from ..flash.attention import one_batch
from ..flash.plan import memory
from ..flash.rope_function import PLAIN, transformed
from ..registry import serve
from .function import attend, call_of, launch_call
from .launch import LONGEST, OTHERS, Call, declines_address, declines_shape

DTYPES: Final = (torch.float16, torch.bfloat16)
OUT_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


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
    """Attend from every query to the keys that it sees; see `longspan.spec.attention`.

    Few queries (`flash.decode.few`) have their keys split over programs, the group packed into the tile of queries.

    Args:
        q: ``[b, h, m, d]`` in fp16 or bf16; not copied, as k and v.
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
        deterministic: Whether the gradient must be bitwise repeatable; ``out`` and ``lse`` always are.

    Returns:
        ``out [b, h, m, e]`` and ``lse [b, h, m]`` float32, contiguous, differentiable both.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention` names.
    """
    return ATTENDING(q, k, v, mask, scale, softcap, sink, alibi, q_offset, k_offset, out_dtype, deterministic)


def declines_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    mask: Mask = everything(), scale: float | None = None, softcap: float | None = None, sink: Tensor | None = None,  # noqa: B008
    alibi: Tensor | None = None, q_offset: int | Tensor | None = None, k_offset: int = 0,
    out_dtype: torch.dtype | None = None, deterministic: bool = False,  # noqa: ARG001
) -> str | None:  # fmt: skip
    """Say why `attention` would raise `Unsupported`, or None. The backward pass serves whatever the forward pass does.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    check_fit(mask, q.shape[0], q.shape[2], q_offset)
    if q.dtype not in DTYPES:
        return f"hopper.attention serves fp16 and bf16, which the tensor cores multiply, got {q.dtype}"
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        return f"hopper.attention returns fp16, bf16 or fp32, got out_dtype {out_dtype}"
    if q.device.type != "cuda":
        return f"hopper.attention runs on a GPU, got tensors on {q.device}"
    reason = None if alibi is None else declines_alibi(alibi, q.shape[2], q_offset, k_offset)
    return reason or declines_heads(q, k, v, sink)


def declines_alibi(alibi: Tensor, m: int, q_offset: int | Tensor | None, k_offset: int) -> str | None:
    """Say why a penalty is not served, or None."""
    if alibi.requires_grad and torch.is_grad_enabled():
        return "hopper.attention has no gradient for alibi, which requires one"
    if isinstance(q_offset, int) and abs(q_offset - k_offset) + m > LONGEST:
        return f"hopper.attention measures ALiBi's distances up to {LONGEST} tokens, got q_offset {q_offset}"
    return None


def declines_heads(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> str | None:
    """Say why the kernels cannot read the heads, or None; those of few queries may be wider, and lie anywhere."""
    few, widest = decode.few(q, k, v), decode.widest(q, k, v, sink)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (reason := declines_shape(name, x, widest)) is not None:
            return reason
        if few and x.stride(3) != 1 and x.numel():
            return f"hopper.attention reads tensors whose last stride is 1, got strides {list(x.stride())} of {name}"
        # Without memory to look at, `function.launch_forward` does, at the launch.
        if not few and not unseen(x) and (reason := declines_address(name, x)) is not None:
            return reason
    return None


def unseen(x: Tensor) -> bool:
    """Whether a tensor has no memory, or none yet."""
    return not x.numel() or torch.compiler.is_compiling() or type(x) not in PLAIN or transformed()


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: Tensor,
    k_lengths: Tensor,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    **options: Any,
) -> AttentionState:
    """Attend within each sequence of a ragged batch, packed as documents; see `longspan.spec.attention_varlen`.

    Args:
        q: ``[tokens, h, d]``, queries of all sequences; not copied, as k and v.
        k: ``[tokens, g, d]``.
        v: ``[tokens, g, e]``.
        q_lengths: Queries of each sequence.
        k_lengths: Keys of each sequence.
        mask: Joined to the documents.
        **options: ``scale``, ``softcap``, ``sink``, ``alibi``, ``out_dtype`` and ``deterministic`` of `attention`.

    Returns:
        ``out [tokens, h, e]``, a view of ``[h, tokens, e]``, and ``lse [tokens, h]``.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention_varlen` names.
    """
    check_ragged(q=q, k=k, v=v)
    check_lengths(q_lengths=q_lengths, k_lengths=k_lengths)
    state = attention(*map(one_batch, (q, k, v)), mask=documents(q_lengths, k_lengths) & mask, **options)
    return AttentionState(
        rearrange(state.out, "1 heads tokens e -> tokens heads e"),
        rearrange(state.lse, "1 heads tokens -> tokens heads"),
    )


def declines_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Tensor, k_lengths: Tensor, *, mask: Mask = everything(), **options: Any  # noqa: B008
) -> str | None:  # fmt: skip
    """Say why `attention_varlen` would raise `Unsupported`, or None."""
    check_ragged(q=q, k=k, v=v)
    check_lengths(q_lengths=q_lengths, k_lengths=k_lengths)
    return declines_attention(*map(one_batch, (q, k, v)), mask=documents(q_lengths, k_lengths) & mask, **options)


def attention_paged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> AttentionState:
    """Attend to the first ``lengths[b]`` keys of each sequence's pages, in fp16 or bf16; see `flash.attention_paged`.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention_paged` names.
    """
    given = (q, q_lengths, k_pages, v_pages, table, lengths)
    if q.dtype not in DTYPES:
        serve(declines_attention_paged(*given, **options), OTHERS)
    return paged.attention_paged(*given, **options)


def declines_attention_paged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **options: Any
) -> str | None:
    """Say why `attention_paged` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    reason = paged.declines_attention_paged(q, q_lengths, k_pages, v_pages, table, lengths, **options)
    if q.dtype not in DTYPES:
        return f"hopper.attention_paged serves fp16 and bf16, which the tensor cores multiply, got {q.dtype}"
    return reason


def code_of(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Hashable:
    """All that the forward kernel of many queries is compiled for."""
    from .choices import variant  # noqa: PLC0415 - Gluon is slow to import, and of no use elsewhere

    return variant(call, q, k, v)


ATTENDING: Final = Attending(call_of, declines_attention, launch_call, attend, code_of, OTHERS, memory())
