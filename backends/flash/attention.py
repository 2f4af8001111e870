"""Attention of the backend `flash`: what it serves, what it declines, and the way to the kernels.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

import math
from collections.abc import Hashable
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.bounds import check_fit
from longspan.spec.checks import check_attention, check_lengths, check_ragged
from longspan.spec.masks import Mask, Term, documents, everything

from . import decode
from .autograd import revealed
from .function import attend, launch_call
from .growing import Launch, Sizes, form
from .kin import LONGEST, Kin
from .launch import INTERPRETED, Call
from .lowering import lower
from .plan import layout, memory, recall, remember
from .reach import reach, told
from .rope import DTYPES, serve
from .rope_function import watched
from .rope_kernel import on

OFFSETS: Final = (int, type(None))
KIN: Final[dict[Any, Kin]] = memory()  # calls, by all but their sizes


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
    known = related(q, k, v, mask, scale, softcap, sink, alibi, q_offset, k_offset, out_dtype)
    if known is not None and (kin := recall(KIN, known[0])) is not None:
        options = scale, softcap, contiguous(sink), contiguous(alibi), q_offset, out_dtype
        state = repeated(kin, *known[1:], q, k, v, *options)
        if state is not None:
            return AttentionState(*state)
    q, k, v, sink, alibi = revealed(q, k, v, sink, alibi)
    reason = declines_attention(
        q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    serve(reason)
    seen = lower(mask, q.shape[0], q.shape[2], k.shape[2], q_offset=q_offset, k_offset=k_offset, device=q.device)
    rest = (
        contiguous(sink), contiguous(alibi), seen.rows, seen.sequences, tuple(seen.interval),
        1 / math.sqrt(q.shape[3]) if scale is None else float(scale), None if softcap is None else float(softcap),
        q.dtype if out_dtype is None else out_dtype,
    )  # fmt: skip
    if known is None:
        return AttentionState(*attend(q, k, v, *rest))
    # Bounds of rows are tensors, whose contents may be others next time; sequences can be lowered again.
    call = Call(*rest, wanted=seen.rows is None and (seen.sequences is None or seen.each is not None))
    state = AttentionState(*launch_call(call, q, k, v))
    if call.again is not None:
        key, sizes, *_ = known
        of = form(q, k, v, sizes, call.interval, seen.each is not None)
        if of is not None:
            kin = recall(KIN, key) or Kin()
            kin.learn(sizes, of, Launch(call.again, seen.each))
            remember(KIN, key, kin)
    return state


def related(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float | None,
    sink: Tensor | None, alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int,
    out_dtype: torch.dtype | None,
) -> tuple[tuple[Hashable, ...], Sizes, tuple[Term, ...], Tensor | None] | None:  # fmt: skip
    """Split a call into all but its sizes, and these; and the mask into terms and lengths, see `reach.told`.

    None if autograd, a transform or a compiler watches, if equal keys could be different calls (True is 1, but no
    offset), and if nobody could launch it again.
    """
    offsets = q_offset if isinstance(q_offset, Tensor) else None
    if type(mask) is not Mask or type(k_offset) is not int or not (offsets is not None or type(q_offset) in OFFSETS):
        return None
    terms = told(mask)
    if terms is None or watched(q, k, v) or any(x is not None and watched(x) for x in (sink, alibi, offsets, terms[1])):
        return None
    if not q.ndim == k.ndim == v.ndim == 4:
        return None
    (b, h, m, d), (of_k, g, n, of_d), (of_v, of_g, values, e) = q.shape, k.shape, v.shape
    key = (
        b, h, d, of_k, g, of_d, of_v, of_g, e, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, terms[0],
        scale, softcap, layout(sink), layout(alibi), layout(terms[1]), layout(offsets), out_dtype,
    )  # fmt: skip
    sizes = Sizes(m, n, values, q.stride(), k.stride(), v.stride(), None if offsets is not None else q_offset, k_offset)
    return key, sizes, *terms


def repeated(
    kin: Kin, sizes: Sizes, terms: tuple[Term, ...], lengths: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    scale: float | None, softcap: float | None, sink: Tensor | None, alibi: Tensor | None,
    q_offset: int | Tensor | None, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Launch a call as another was that is kin to it; None if none is launched alike."""
    launch = kin.find(sizes)
    if launch is None:
        m, n = sizes.m, sizes.n
        sees, each = reach(terms), lengths is not None or isinstance(q_offset, Tensor)
        interval = (-m, n, n, 0, 0) if each else sees.interval(m, n, sizes.q_offset, sizes.k_offset)
        alike = kin.forms.get(form(q, k, v, sizes, interval, each))
        if alike is None:
            return None
        call = Call(
            sink, alibi, None, None, interval, 1 / math.sqrt(q.shape[3]) if scale is None else float(scale),
            None if softcap is None else float(softcap), q.dtype if out_dtype is None else out_dtype,
        )  # fmt: skip
        launch = alike.resized(sizes, call, sees, q, k, v, lengths, q_offset)
        kin.last = sizes, launch
    with on(q.device):
        return launch(q, k, v, sink, alibi, lengths, q_offset)


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


def contiguous(x: Tensor | None) -> Tensor | None:
    """Lay a number per head out densely: h numbers."""
    return None if x is None else x.contiguous()
