# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The rotation of rotary embedding in Triton (Su et al. 2021, arXiv:2104.09864, §3.2.2): exact angles, no table.

A program owns BLOCK_M tokens: it makes their cosines and sines once and turns all their heads by them.
Angles are 64-bit integers, a full turn being 2^64 (`longspan.spec.turns`), so a position has no rounding at all.
Shapes of tiles: M tokens, P planes, H heads, C columns copied.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import Bound, planned
from .rope_choices import choose_rope, power_of_two


@triton.jit
def turns_of(inv_freq):
    """Return turns per token in units of 2^-64: `longspan.spec.turns` step by step, hence bit for bit.

    As long as a token is less than 2^51 turns.
    """
    fraction = inv_freq / 6.283185307179586
    # Adding 1.5 · 2^52 leaves no bit behind the point: round to nearest even, as torch does.
    fraction = fraction - ((fraction + 6755399441055744.0) - 6755399441055744.0)
    scaled = fraction * 18446744073709551616.0
    # 2^63 itself does not fit; half a turn is its own negative.
    return tl.where(scaled >= 9223372036854775808.0, scaled - 1024.0, scaled).to(tl.int64)


@triton.jit
def cosine_sine(position, turns, INVERSE: tl.constexpr):
    """Return cosine and sine of ``position · turns`` in float32, each within 1.1e-7.

    The nearest quarter turn is taken off in integers; on the rest, |t| <= 1/2 quarter, polynomials are minimax
    (1.2e-9 and 5.4e-11), so what is left is their rounding. There is no slow path for large angles.
    """
    high = ((position * turns) >> 32).to(tl.int32)
    quarter = ((high >> 29) + 1) >> 1
    t = ((high << 2) >> 2).to(tl.float32) * 9.313225746154785e-10  # 2^-30: the low 30 bits, signed, of a quarter
    u = t * t
    s = t * (((u * -0.004592289216816425 + 0.07967590540647507) * u - 0.6459629535675049) * u + 1.570796251296997)
    c = ((u * 0.0009040216682478786 - 0.02086028829216957) * u + 0.25366923213005066) * u - 1.2337005138397217
    c = 1.0 + u * c
    odd = (quarter & 1) != 0
    sin, cos = tl.where(odd, c, s), tl.where(odd, s, c)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def rotation_of(
    position, inv_freq, factor_rows, axis, factor, b, i, live, axes,
    position_axis, position_b, position_m, inv_freq_b, factor_b,
    ROWS: tl.constexpr, INVERSE: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return cosines and sines [M, P] of a block of tokens, the attention factor in them."""
    plane = tl.arange(0, BLOCK_P)
    real = plane < PLANES
    if ROWS:
        speed = tl.load(inv_freq + b[:, None] * inv_freq_b + plane[None, :], live[:, None] & real[None, :], 0.0)
    else:
        speed = tl.load(inv_freq + plane, real, 0.0)[None, :]
    at = b * position_b + i * position_m
    if axis is None:
        where = tl.load(position + at, live, 0).to(tl.int64)[:, None]
    else:
        driver = tl.load(axis + plane, real, 0)
        driver = tl.where(driver < 0, driver + axes, driver)
        known = real & (driver >= 0) & (driver < axes)  # an axis that is not there must not be read
        where = tl.load(
            position + at[:, None] + (driver * position_axis)[None, :], live[:, None] & known[None, :], 0
        ).to(tl.int64)
    cos, sin = cosine_sine(where, turns_of(speed), INVERSE)
    if factor_rows is not None:
        factor = tl.load(factor_rows + b * factor_b, live, 0.0).to(tl.float32)[:, None]
    return cos * factor, sin * factor


@triton.jit
def load_planes(
    x, row, live, heads, stride, start,
    PLANES: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Read the planes [H, M, P] of the heads from ``start`` on, as (real parts, imaginary parts)."""
    head = start + tl.arange(0, BLOCK_H)
    source = x + row[None, :, None] + (head.to(tl.int64) * stride)[:, None, None]  # [H, M, 1]
    keep = live[None, :, None] & (head < heads)[:, None, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        if PLANES != BLOCK_P:
            keep = keep & (column < 2 * PLANES)
        pair = tl.load(source + column, keep, 0.0)
        real, imag = tl.split(tl.reshape(pair, [BLOCK_H, BLOCK_M, BLOCK_P, 2]))
    else:
        plane = tl.arange(0, BLOCK_P)[None, None, :]
        if PLANES != BLOCK_P:
            keep = keep & (plane < PLANES)
        real = tl.load(source + plane, keep, 0.0)
        imag = tl.load(source + plane + PLANES, keep, 0.0)
    return real, imag


@triton.jit
def store_planes(
    out, row, live, heads, stride, start, real, imag,
    PLANES: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write planes where `load_planes` reads them."""
    head = start + tl.arange(0, BLOCK_H)
    target = out + row[None, :, None] + (head.to(tl.int64) * stride)[:, None, None]
    keep = live[None, :, None] & (head < heads)[:, None, None]
    real, imag = real.to(out.dtype.element_ty), imag.to(out.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        if PLANES != BLOCK_P:
            keep = keep & (column < 2 * PLANES)
        tl.store(target + column, tl.reshape(tl.join(real, imag), [BLOCK_H, BLOCK_M, 2 * BLOCK_P]), keep)
    else:
        plane = tl.arange(0, BLOCK_P)[None, None, :]
        if PLANES != BLOCK_P:
            keep = keep & (plane < PLANES)
        tl.store(target + plane, real, keep)
        tl.store(target + plane + PLANES, imag, keep)


@triton.jit
def turn_heads(
    x, out, row, out_row, live, heads, stride, out_stride, first, step, real, imag, cos, sin,
    PLANES: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Turn the heads ``first, first + step, …`` of a block of tokens, of which the first were read already.

    The next heads are on their way while these are turned.
    """
    for start in range(first, heads, step):
        next_real, next_imag = load_planes(
            x, row, live, heads, stride, start + step, PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P
        )
        real, imag = real.to(tl.float32), imag.to(tl.float32)
        store_planes(
            out, out_row, live, heads, out_stride, start,
            real * cos[None] - imag * sin[None], real * sin[None] + imag * cos[None],
            PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P,
        )  # fmt: skip
        real, imag = next_real, next_imag


@triton.jit
def copy_heads(
    x, out, row, out_row, live, heads, stride, out_stride, first, step,
    COLUMN: tl.constexpr, COUNT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy COUNT columns, from COLUMN on, of the heads ``first, first + step, …`` of a block of tokens."""
    for start in range(first, heads, step):
        head = start + tl.arange(0, BLOCK_H)
        source = x + row[None, :, None] + (head.to(tl.int64) * stride)[:, None, None]
        target = out + out_row[None, :, None] + (head.to(tl.int64) * out_stride)[:, None, None]
        keep = live[None, :, None] & (head < heads)[:, None, None]
        for block in range(0, COUNT, BLOCK_C):
            column = block + tl.arange(0, BLOCK_C)[None, None, :]
            inside = keep & (column < COUNT)
            tl.store(target + COLUMN + column, tl.load(source + COLUMN + column, inside, 0.0), inside)


@planned
@triton.jit(
    do_not_specialize=[
        "tokens",
        "m",
        "axes",
        "q_heads",
        "k_heads",
        "position_axis",
        "position_b",
        "inv_freq_b",
        "factor_b",
    ],
    do_not_specialize_on_alignment=["position", "factor_rows", "axis"],
)
def rotate_kernel(
    q, q_out, k, k_out, position, inv_freq, factor_rows, axis, factor, tokens, m, axes, q_heads, k_heads,
    q_b, q_h, q_m, q_out_b, q_out_h, q_out_m, k_b, k_h, k_m, k_out_b, k_out_h, k_out_m,
    position_axis, position_b, position_m, inv_freq_b, factor_b,
    PLANES: tl.constexpr, Q_TAIL: tl.constexpr, K_TAIL: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_M tokens of q and of k; ``program_id(1)`` of SPLIT shares the heads out where tokens are few."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)  # of all sequences, in order
    live = token < tokens
    b = token // m  # a division of 64 bits would be a hundred instructions ahead of the first load
    i = (token - b * m).to(tl.int64)
    b = b.to(tl.int64)
    first, step = tl.program_id(1) * BLOCK_H, SPLIT * BLOCK_H
    q_row, q_out_row = b * q_b + i * q_m, b * q_out_b + i * q_out_m
    k_row, k_out_row = b * k_b + i * k_m, b * k_out_b + i * k_out_m
    if PLANES > 0:
        real, imag = load_planes(
            q, q_row, live, q_heads, q_h, first, PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P
        )  # on their way while the angles are made
        cos, sin = rotation_of(
            position, inv_freq, factor_rows, axis, factor, b, i, live, axes,
            position_axis, position_b, position_m, inv_freq_b, factor_b, ROWS, INVERSE, PLANES, BLOCK_P,
        )  # fmt: skip
        turn_heads(
            q, q_out, q_row, q_out_row, live, q_heads, q_h, q_out_h, first, step, real, imag, cos, sin,
            PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P,
        )  # fmt: skip
        real, imag = load_planes(k, k_row, live, k_heads, k_h, first, PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P)
        turn_heads(
            k, k_out, k_row, k_out_row, live, k_heads, k_h, k_out_h, first, step, real, imag, cos, sin,
            PLANES, INTERLEAVED, BLOCK_M, BLOCK_H, BLOCK_P,
        )  # fmt: skip
    if Q_TAIL > 0:
        copy_heads(
            q, q_out, q_row, q_out_row, live, q_heads, q_h, q_out_h, first, step, 2 * PLANES, Q_TAIL, BLOCK_H, BLOCK_C
        )
    if K_TAIL > 0:
        copy_heads(
            k, k_out, k_row, k_out_row, live, k_heads, k_h, k_out_h, first, step, 2 * PLANES, K_TAIL, BLOCK_H, BLOCK_C
        )


# TRITON_INTERPRET=1 counts when kernels are defined, so that they, and no variable, say whether it did.
INTERPRETED: Final = not isinstance(turns_of, triton.runtime.JITFunction)


def columns(planes: int, count: int) -> int:
    """Columns copied at once: as much of a tile as its planes take."""
    return min(power_of_two(count), max(16, 2 * power_of_two(planes)))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def strides_of(position: Tensor) -> tuple[int, int, int]:
    """Strides of positions [axes, b, m], broadcast where they lack an axis or have one row."""
    stride = (0, 0, 0, *position.stride())[-3:]
    return stride[0], 0 if position.ndim == 1 or position.shape[-2] == 1 else stride[1], stride[2]


def launch(
    x: Sequence[Tensor], out: Sequence[Tensor], position: Tensor, inv_freq: Tensor,
    rows: Tensor | None, axis: Tensor | None, factor: float, interleaved: bool, inverse: bool,
) -> Bound | None:  # fmt: skip
    """Launch the kernel on one tensor or two; a tensor that is its own output keeps its tail."""
    q, k, q_out, k_out = x[0], x[-1], out[0], out[-1]
    b, q_heads, m, d = q.shape
    k_heads = k.shape[1] if len(x) > 1 else 0
    planes, tokens = inv_freq.shape[-1], b * m
    if tokens * (q_heads + k_heads) == 0:
        return None
    q_tail, k_tail = (0 if q_out is q else d - 2 * planes), (0 if k_out is k else k.shape[-1] - 2 * planes)
    inv_freq = inv_freq if inv_freq.stride(-1) == 1 else inv_freq.contiguous()
    with on(q.device):
        choice = choose_rope(
            tokens, max(q_heads, k_heads), planes, q.element_size(), heads_inside=q.stride(1) < q.stride(2)
        )
        return rotate_kernel[-(-tokens // choice.tokens), choice.split](
            q, q_out, k, k_out, position, inv_freq, rows, axis, factor, tokens, m, position.shape[0], q_heads, k_heads,
            *q.stride()[:3], *q_out.stride()[:3], *k.stride()[:3], *k_out.stride()[:3],
            *strides_of(position), inv_freq.stride(0) if inv_freq.ndim > 1 else 0,
            0 if rows is None or rows.numel() == 1 else rows.stride(0),
            PLANES=planes, Q_TAIL=q_tail, K_TAIL=k_tail if k_heads else 0,
            WIDE=tokens >= 2**31 - 1024, ROWS=inv_freq.ndim > 1, INTERLEAVED=interleaved, INVERSE=inverse,
            BLOCK_M=choice.tokens, BLOCK_H=choice.heads, BLOCK_P=power_of_two(planes),
            BLOCK_C=columns(planes, max(q_tail, k_tail)), SPLIT=choice.split, num_warps=choice.num_warps,
        )  # fmt: skip
