# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention over a paged cache (PagedAttention, Kwon et al. 2023, arXiv:2309.06180, §4.1).

Shapes: tokens of all sequences' queries together, b sequences, h query heads, g key heads, d head, e value dimension.
"""

import math
from collections.abc import Hashable
from typing import Any, Final

import torch
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.checks import check_attention, check_lengths, check_pages, check_ragged
from longspan.spec.masks import Chunks, Mask, check_join, check_mask, documents, everything

from ..registry import serve
from .attending import contiguous
from .attention import one_batch
from .autograd import revealed
from .decode import fits
from .kin import LONGEST, Kin
from .launch import INTERPRETED
from .paged_launch import SEQUENCES, form, run, sight
from .paged_launch import launch as launch  # noqa: PLC0414 - the tuner launches without a call
from .plan import layout, memory, recall, remember
from .rope import DTYPES
from .rope_function import PLAIN, transformed, watched
from .rope_kernel import on

KIN: Final[dict[Any, Kin]] = memory()  # calls, by all but their sizes


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
    """Attend to the first ``lengths[b]`` keys of each sequence's pages; see `longspan.spec.attention_paged`.

    Args:
        q: ``[tokens, h, d]`` in fp16, bf16 or fp32, any strides with a unit last one; not copied, as the pools.
        q_lengths: Queries of each sequence, as for the other integers int32 or int64.
        k_pages: Pool of key pages ``[pages, g, page, d]``; free slots may hold anything.
        v_pages: Pool of value pages ``[pages, g, page, e]``.
        table: Pages of each sequence ``[b, ·]``. On a GPU entries are not checked, for that would stall it.
        lengths: Keys of each sequence.
        mask: Which keys a query sees, in coordinates of its sequence.
        scale: See `attention`, as for the rest.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        out_dtype: See `attention`.
        deterministic: See `attention`.

    Returns:
        ``out [tokens, h, e]`` and ``lse [tokens, h]`` float32, contiguous.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention_paged` names.
    """
    given = (q, q_lengths, k_pages, v_pages, table, lengths)
    known = related(*given, mask, scale, softcap, sink, alibi, out_dtype)
    if known is not None and (kin := recall(KIN, known[0])) is not None:
        sizes = known[1]
        again = kin.find(sizes)
        if again is None and (alike := kin.forms.get(form(*given))) is not None:
            again = alike.resized(*given)
            kin.last = sizes, again
        if again is not None:
            with on(q.device):
                state = again(*given, contiguous(sink), contiguous(alibi))
            if state is not None:
                return AttentionState(*state)
    q, k_pages, v_pages, sink, alibi = revealed(q, k_pages, v_pages, sink, alibi)
    reason = declines_attention_paged(
        q, q_lengths, k_pages, v_pages, table, lengths, mask=mask, scale=scale, softcap=softcap, sink=sink,
        alibi=alibi, out_dtype=out_dtype, deterministic=deterministic,
    )  # fmt: skip
    serve(reason)
    seen = sight(mask)
    rest = (
        q, q_lengths.to(q.device), k_pages, v_pages, table, lengths, contiguous(sink), contiguous(alibi),
        [seen.low, seen.high, seen.prefix, seen.keep, *seen.chunks],
        1 / math.sqrt(q.shape[2]) if scale is None else float(scale), None if softcap is None else float(softcap),
        q.dtype if out_dtype is None else out_dtype,
    )  # fmt: skip
    if torch.compiler.is_compiling() or type(q) not in PLAIN:
        return AttentionState(*torch.ops.longspan.flash_attention_paged(*rest))
    out, lse, again = run(*rest)
    if known is not None and again is not None and (of := form(*given)) is not None:
        kin = recall(KIN, known[0]) or Kin()
        kin.learn(known[1], of, again)
        remember(KIN, known[0], kin)
    return AttentionState(out, lse)


def related(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, mask: Mask,
    scale: float | None, softcap: float | None, sink: Tensor | None, alibi: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Hashable, Hashable] | None:  # fmt: skip
    """Split a call into all but its sizes, and these; None if it is watched, see `attention.related`."""
    if type(mask) is not Mask or watched(q, q_lengths, k_pages, v_pages, table, lengths):
        return None
    if (sink is not None and watched(sink)) or (alibi is not None and watched(alibi)):
        return None
    device = q.device
    if not device == q_lengths.device == k_pages.device == v_pages.device == table.device == lengths.device:
        return None  # what is launched is a copy of it
    if not (
        q.ndim == 3 and k_pages.ndim == v_pages.ndim == 4 and table.ndim == 2 and q_lengths.ndim == lengths.ndim == 1
    ):
        return None
    (tokens, h, d), (pages, g, page, of_d), (values, of_g, of_page, e) = q.shape, k_pages.shape, v_pages.shape
    key = (
        h, d, g, page, of_d, of_g, of_page, e, device, q.dtype, q_lengths.dtype, k_pages.dtype, v_pages.dtype,
        table.dtype, lengths.dtype, mask.terms, scale, softcap, layout(sink), layout(alibi), out_dtype,
    )  # fmt: skip
    shapes = tokens, pages, values, table.shape, q_lengths.shape, lengths.shape
    strides = q.stride(), k_pages.stride(), v_pages.stride(), table.stride(), q_lengths.stride(), lengths.stride()
    return key, (shapes, strides)


def declines_attention_paged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, *,
    mask: Mask = everything(), scale: float | None = None, softcap: float | None = None,  # noqa: B008
    sink: Tensor | None = None, alibi: Tensor | None = None, out_dtype: torch.dtype | None = None,
    deterministic: bool = False,  # noqa: ARG001
) -> str | None:  # fmt: skip
    """Say why `attention_paged` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_ragged(q=q)
    check_lengths(q_lengths=q_lengths, lengths=lengths)
    check_pages(k_pages, v_pages, table, lengths)
    check_mask(mask)
    check_join((*documents(q_lengths, lengths).terms, *mask.terms))
    keys, values = (x[:1] if x.shape[0] else x.new_empty(1, *x.shape[1:]) for x in (k_pages, v_pages))
    check_attention(
        one_batch(q), keys, values, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=None, k_offset=0, out_dtype=out_dtype,
    )  # fmt: skip
    given = [x for x in (q, k_pages, v_pages, sink, alibi) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return (
            "flash.attention_paged has no gradient, got a tensor that requires one: torch.no_grad() says it needs none"
        )
    if transformed():
        return "flash.attention_paged has no derivative and no batching rule for torch.func"
    if q.dtype not in DTYPES:
        return f"flash.attention_paged computes in float32 and serves fp16, bf16 and fp32, got {q.dtype}"
    if out_dtype is not None and out_dtype not in DTYPES:
        return f"flash.attention_paged returns fp16, bf16 or fp32, got out_dtype {out_dtype}"
    several = "flash.attention_paged serves at most two terms of chunks in one mask"
    return several if len(mask.of(Chunks)) > 2 else declines_pool(q, k_pages, v_pages, table)


def declines_pool(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> str | None:
    """Say why the kernel cannot read the queries or the pools, or None."""
    d, e = q.shape[2], v_pages.shape[3]
    if not INTERPRETED and q.device.type != "cuda":
        return f"flash.attention_paged runs on a GPU, or on a CPU under TRITON_INTERPRET=1, got tensors on {q.device}"
    if d % 8 or e % 8 or not fits(d, e):
        return f"flash.attention_paged serves head dimensions in steps of 8 up to 1024, values 512, got {d} and {e}"
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if x.stride(-1) != 1 and x.numel():
            return f"flash.attention_paged reads tensors whose last stride is 1, got {list(x.stride())} of {name}"
    if table.shape[0] > SEQUENCES:
        return f"flash.attention_paged plans at most {SEQUENCES} sequences in one call, got {table.shape[0]}"
    if q.shape[0] * q.shape[1] > LONGEST or table.shape[1] * k_pages.shape[2] > LONGEST:
        return (
            f"flash.attention_paged counts at most {LONGEST} rows and keys, got {q.shape[0]} tokens"
            f" of {q.shape[1]} heads and {table.shape[1]} pages of {k_pages.shape[2]}"
        )
    return None
