# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Appending to a cache in one launch: new keys are rotated, and keys and values written to their slots.

A slot is ``row · size + column`` of a dense cache ``[b, g, n, d]`` or of a pool of pages ``[pages, g, page, d]``
(PagedAttention, Kwon et al. 2023, arXiv:2309.06180, §4.1); -1 skips a token. Nothing is read back by the host.
Shapes: tokens new tokens of all sequences together, g key heads, d and e key and value dimensions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.spec import Rotation
from longspan.spec.checks import check_append, check_rotate
from longspan.spec.pairing import Pairing

from ..registry import serve
from .plan import planned
from .rope import (
    arguments,
    declines_derivative,
    declines_heads,
    declines_in_place,
    declines_rotation,
)
from .rope_function import PLAIN, written
from .rope_kernel import (
    choose_rope,
    columns,
    copy_heads,
    load_planes,
    on,
    power_of_two,
    rotation_of,
    strides_of,
    turn_heads,
)


@planned
@triton.jit(
    do_not_specialize=["tokens", "slots", "size", "axes", "heads", "position_axis", "inv_freq_t", "factor_t"],
    do_not_specialize_on_alignment=["slot", "position", "factor_rows", "axis"],
)
def append_kernel(
    k, v, k_cache, v_cache, slot, position, inv_freq, factor_rows, axis, factor, tokens, slots, size, axes, heads,
    k_t, k_h, v_t, v_h, k_row, k_head, k_column, v_row, v_head, v_column, slot_t,
    position_axis, position_t, inv_freq_t, factor_t,
    D: tl.constexpr, E: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M tokens; ``program_id(1)`` of SPLIT shares the heads out."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = token < tokens
    place = tl.load(slot + token * slot_t, there, -1).to(tl.int64)
    live = (place >= 0) & (place < slots)  # a slot outside the cache must not overwrite what is there
    row = place // size
    column = place - row * size
    first, step = tl.program_id(1) * BLOCK_H, SPLIT * BLOCK_H
    source, target = token * k_t, row * k_row + column * k_column
    if PLANES > 0:
        real, imag = load_planes(k, source, live, heads, k_h, first, PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P)
        cos, sin = rotation_of(
            position, inv_freq, factor_rows, axis, factor, token, token, live, axes,
            position_axis, position_t, 0, inv_freq_t, factor_t, ROWS, False, PLANES, BLOCK_P,
        )  # fmt: skip
        turn_heads(
            k, k_cache, source, target, live, heads, k_h, k_head, first, step, real, imag, cos, sin,
            PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P,
        )  # fmt: skip
    if 2 * PLANES < D:
        copy_heads(
            k, k_cache, source, target, live, heads, k_h, k_head, first, step,
            2 * PLANES, D - 2 * PLANES, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    copy_heads(
        v, v_cache, token * v_t, row * v_row + column * v_column, live, heads, v_h, v_head, first, step,
        0, E, BLOCK_H, BLOCK_E,
    )  # fmt: skip


def append_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, *,
    position: Tensor | None = None, rotation: Rotation | None = None, pairing: Pairing = "half",
) -> None:  # fmt: skip
    """Write new keys, rotated, and new values into a cache in place; see `longspan.spec.append`.

    Args:
        k: New keys ``[tokens, g, d]``, not yet rotated; any strides with a unit last one, as for all of these.
        v: New values ``[tokens, g, e]``.
        k_cache: Cached keys ``[rows, g, size, d]``, or a pool of pages; overwritten.
        v_cache: Cached values ``[rows, g, size, e]``; overwritten.
        slot: Where each token goes. A slot outside the cache is skipped like -1: looking for one would stall the GPU.
        position: Position of each token, ``[tokens]`` or ``[axes, tokens]``; only with a rotation.
        rotation: How the new keys turn, its rows one for all or one per token; None leaves them as they are.
        pairing: See `rotate`.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_append_` names.
    """
    serve(declines_append_(k, v, k_cache, v_cache, slot, position=position, rotation=rotation, pairing=pairing))
    turning: tuple[Any, ...] = (None, None, None, None, 1.0)
    if rotation is not None and position is not None:
        turning = arguments(position.unsqueeze(-1), rotation)
    rest = (k, v, k_cache, v_cache, slot, *turning, pairing == "interleaved")
    if torch.compiler.is_compiling() or type(k) not in PLAIN:
        torch.ops.longspan.flash_append_(*rest)
    else:
        write_(*rest)
        written(k_cache, v_cache)


def declines_append_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, *,
    position: Tensor | None = None, rotation: Rotation | None = None, pairing: Pairing = "half",
) -> str | None:  # fmt: skip
    """Say why `append_` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_append(k, v, k_cache, v_cache, slot, position, rotation is not None)
    reason = declines_heads("append_", k, v, k_cache, v_cache) or declines_in_place("append_", k_cache, v_cache)
    if rotation is not None and position is not None:
        heads = k.unsqueeze(2)  # each token a sequence of its own, as the specification turns them
        check_rotate(
            heads, position.unsqueeze(-1), rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing
        )
        reason = reason or declines_rotation("append_", rotation)
    return reason or declines_derivative("append_", k, v)


def write_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor,
    position: Tensor | None, inv_freq: Tensor | None, rows: Tensor | None, axis: Tensor | None, factor: float,
    interleaved: bool,
) -> None:  # fmt: skip
    """Launch the kernel; positions are ``[tokens, 1]`` or ``[axes, tokens, 1]`` as `rotate` takes them."""
    tokens, heads, d = k.shape
    count, _, size, e = v_cache.shape
    if tokens * heads * count * size == 0:
        return
    planes = 0 if inv_freq is None else inv_freq.shape[-1]
    if inv_freq is not None and inv_freq.stride(-1) != 1:
        inv_freq = inv_freq.contiguous()
    widest = max(planes, min(d, e) // 2)
    placed = (0, 0, 0) if position is None else strides_of(position)
    with on(k.device):
        choice = choose_rope(tokens, heads, widest, k.element_size(), heads_inside=True)
        append_kernel[-(-tokens // choice.tokens), choice.split](
            k, v, k_cache, v_cache, slot, position, inv_freq, rows, axis, factor, tokens, count * size, size,
            1 if position is None else position.shape[0], heads,
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], slot.stride(0),
            *placed[:2], inv_freq.stride(0) if inv_freq is not None and inv_freq.ndim > 1 else 0,
            0 if rows is None or rows.numel() == 1 else rows.stride(0),
            D=d, E=e, PLANES=planes, ROWS=inv_freq is not None and inv_freq.ndim > 1, INTERLEAVED=interleaved,
            BLOCK_M=choice.tokens, BLOCK_H=choice.heads, BLOCK_P=power_of_two(planes),
            BLOCK_D=columns(widest, d - 2 * planes), BLOCK_E=columns(widest, e),
            SPLIT=choice.split, num_warps=choice.num_warps,
        )  # fmt: skip


torch.library.define(
    "longspan::flash_append_",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot, Tensor? position, Tensor? inv_freq,"
    " Tensor? rows, Tensor? axis, float factor, bool interleaved) -> ()",
)
torch.library.impl("longspan::flash_append_", ("cuda", "cpu"), write_)


@torch.library.register_fake("longspan::flash_append_")
def _(*_: Any) -> None:
    pass
