"""Attention of the backend `hopper`: what it serves, what it declines, and the way to the kernels.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

import math
from dataclasses import replace
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.bounds import check_fit
from longspan.spec.checks import check_attention, check_lengths, check_pages, check_ragged
from longspan.spec.masks import Mask, documents, everything

from ..flash import decode
from ..flash.attention import asked, contiguous, one_batch
from ..flash.function import revealed
from ..flash.launch import Again
from ..flash.lowering import lower
from ..flash.plan import Sightings, memory, recall, remember
from ..flash.rope_function import transformed
from ..flash.rope_kernel import on
from ..registry import Unsupported
from .function import attend, call_of, launch_call
from .launch import LONGEST, declines_layout

DTYPES: Final = (torch.float16, torch.bfloat16)
REPEATED: Final[dict[Any, Again]] = memory()  # what `asked` returns, to how it was launched
SEEN: Final = Sightings()
LONG: Final = 1024  # keys that one program reads slower than many
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
    key = asked(q, k, v, mask, scale, softcap, sink, alibi, q_offset, k_offset, out_dtype)
    if key is not None and (again := recall(REPEATED, key)) is not None:
        with on(q.device):
            state = again(q, k, v, contiguous(sink), contiguous(alibi))
        if state is not None:
            return AttentionState(*state)
    q, k, v, sink, alibi = revealed(q, k, v, sink, alibi)
    reason = declines_problem(
        q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    serve(reason)
    rest = lowered(
        q, k, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype, deterministic=deterministic,
    )  # fmt: skip
    if key is None:
        serve(declines_gradient(q, k, v, sink, rest))
        return AttentionState(*attend(q, k, v, *rest))
    call = call_of(*rest)
    # Bounds are tensors, whose contents may be others next time.
    call = replace(call, wanted=call.rows is None and call.sequences is None and SEEN.again(key))
    state = AttentionState(*launch_call(call, q, k, v))
    if call.wanted and call.again is not None:
        remember(REPEATED, key, call.again)
    return state


def declines_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    mask: Mask = everything(), scale: float | None = None, softcap: float | None = None, sink: Tensor | None = None,  # noqa: B008
    alibi: Tensor | None = None, q_offset: int | Tensor | None = None, k_offset: int = 0,
    out_dtype: torch.dtype | None = None, deterministic: bool = False,
) -> str | None:  # fmt: skip
    """Say why `attention` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    options = {"scale": scale, "softcap": softcap, "sink": sink, "alibi": alibi, "q_offset": q_offset,
               "k_offset": k_offset, "out_dtype": out_dtype}  # fmt: skip
    reason = declines_problem(q, k, v, mask=mask, **options)
    if reason is not None or not differentiated(q, k, v, sink):
        return reason
    return declines_gradient(q, k, v, sink, lowered(q, k, mask=mask, deterministic=deterministic, **options))


def declines_problem(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None, softcap: float | None, sink: Tensor | None,
    alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int, out_dtype: torch.dtype | None,
) -> str | None:  # fmt: skip
    """Say why the forward kernel does not serve a problem, or None."""
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
    if decode.few(q, k, v) and k.shape[2] >= LONG:
        return f"hopper.attention does not split keys over programs, which {q.shape[2]} queries need"
    reason = None if alibi is None else declines_alibi(alibi, q.shape[2], q_offset, k_offset)
    return reason or declines_layout("q", q) or declines_layout("k", k) or declines_layout("v", v)


def declines_alibi(alibi: Tensor, m: int, q_offset: int | Tensor | None, k_offset: int) -> str | None:
    """Say why a penalty is not served, or None."""
    if alibi.requires_grad and torch.is_grad_enabled():
        return "hopper.attention has no gradient for alibi, which requires one"
    if isinstance(q_offset, int) and abs(q_offset - k_offset) + m > LONGEST:
        return f"hopper.attention measures ALiBi's distances up to {LONGEST} tokens, got q_offset {q_offset}"
    return None


def lowered(
    q: Tensor, k: Tensor, *, mask: Mask, scale: float | None, softcap: float | None, sink: Tensor | None,
    alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int, out_dtype: torch.dtype | None,
    deterministic: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `Call`: the mask as integers, and everything else as kernels take it."""
    seen = lower(mask, q.shape[0], q.shape[2], k.shape[2], q_offset=q_offset, k_offset=k_offset, device=q.device)
    return (
        contiguous(sink), contiguous(alibi),
        seen.rows, seen.sequences, tuple(seen.interval),
        1 / math.sqrt(q.shape[3]) if scale is None else float(scale), None if softcap is None else float(softcap),
        q.dtype if out_dtype is None else out_dtype, deterministic,
    )  # fmt: skip


def differentiated(*x: Tensor | None) -> bool:
    """Whether a gradient may be asked of a call."""
    asked = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in x)
    return asked or transformed()


def declines_gradient(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, rest: tuple[Any, ...]) -> str | None:
    """Say why a problem has no backward kernel, or None where it has, or needs none."""
    if not differentiated(q, k, v, sink):
        return None
    from .backward import declines_backward  # noqa: PLC0415 - Gluon is slow to import, and of no use elsewhere

    return declines_backward(call_of(*rest), q, k, v)


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
    """Decline: no kernel of this package reads block tables.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: Always.
    """
    serve(declines_attention_paged(q, q_lengths, k_pages, v_pages, table, lengths, **options))
    raise AssertionError


def declines_attention_paged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, **_: Any
) -> str:
    """Say why `attention_paged` raises `Unsupported`."""
    check_ragged(q=q)
    check_lengths(q_lengths=q_lengths, lengths=lengths)
    check_pages(k_pages, v_pages, table, lengths)
    return "hopper.attention_paged is not served: no kernel of this package reads block tables"


def serve(reason: str | None) -> None:
    """Raise `Unsupported` where there is a reason to."""
    if reason is not None:
        raise Unsupported(reason, alternatives=("flash", "eager"))
