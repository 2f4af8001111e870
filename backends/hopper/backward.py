"""The backward pass of the backend `hopper`: what it serves, and the launches.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

from ..flash.backward import launch_queries
from ..flash.launch import LOG2_E, per_sequence
from ..flash.lowering import all_seen
from ..flash.sight import sight
from .backward_kernel import backward_kernel
from .backward_passes import finish_kernel, prepare_kernel
from .gluon import TensorDescriptor, gl
from .launch import Call, declines_address, describe, padded

WIDEST: Final = 128  # of a head, keys or values: dK and dV of a key tile are summed in registers
LINES: Final = 128  # rows of a head are padded to a multiple of it, and so of every tile


class Choice(NamedTuple):
    """How the kernel is launched.

    Attributes:
        tile_m: Queries of a tile.
        tile_n: Keys of a tile.
        stages: Tiles of queries in the ring.
        together: Heads that are worked on at the same time; see `backward_tiles.assignment`.
    """

    tile_m: int
    tile_n: int = 128
    stages: int = 2
    together: int = 1


def choose(d: int, e: int) -> Choice:
    """Choose how the kernel is launched for padded dimensions."""
    return Choice(tile_m=128 if max(d, e) == 64 else 64)


def declines_backward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why `backward` would not run, or None."""
    del call, k
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return (
            f"hopper.attention has gradients for head dimensions up to {WIDEST}, "
            f"got {q.shape[3]} of q and {v.shape[3]} of v"
        )
    return None


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels.

    Beside the gradients it allocates two float32 numbers a row, the sums of dq in float32 (unless ``deterministic``),
    and a copy of ``d_out`` if that is of another dtype than v or the copy engine cannot address it.

    Args:
        call: What was asked.
        q: ``[b, h, m, d]``.
        k: ``[b, g, n, d]``.
        v: ``[b, g, n, e]``.
        out: ``[b, h, m, e]``, contiguous.
        lse: ``[b, h, m]``, contiguous.
        d_out: Gradient of ``out``.
        d_lse: Gradient of ``lse``, or None for zeros.
        choice: How the kernel is launched.

    Returns:
        Gradients of q, k and v, contiguous, and of the sinks by sequence, ``[b, h]``, or ``[b, 0]`` without sinks.
    """
    b, h, m, e = out.shape
    choice = choose(padded(q.shape[3]), padded(e)) if choice is None else choice
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_out = d_out.to(v.dtype)
    d_out = d_out if declines_address("d_out", d_out) is None else d_out.contiguous()
    lines = triton.cdiv(m, LINES) * LINES
    lse_two, delta = lse.new_empty(2, b, h, lines)
    if b * h * m:
        d_lse = None if d_lse is None else d_lse.contiguous()
        prepare_kernel[(b * h * lines // 16,)](
            out, d_out, lse, d_lse, lse_two, delta, *d_out.stride()[:3], h, m, lines, e,
            R=16, E=padded(e), D_LSE=d_lse is not None,
        )  # fmt: skip
    if out.numel() and dk.numel():
        sums = None if call.deterministic else lse.new_zeros(b, h, lines, padded(q.shape[3]))
        launch(call, choice, q, k, v, d_out, lse_two, delta, sums, dk, dv)
        if sums is None:
            launch_queries(call, q, k, v, d_out, lse_two[..., :m].contiguous(), delta[..., :m].contiguous(), dq)
        else:
            finish_kernel[(b * h * lines // 32,)](
                sums, dq, m, lines, q.shape[3], call.scale, R=32, D=padded(q.shape[3])
            )
    else:
        for x in (dq, dk, dv):
            x.zero_()
    if call.sink is None:
        return dq, dk, dv, lse.new_empty(b, 0)
    # The sink's weight is exp(sink - lse) and its value zero: dS = P (0 - delta).
    share = torch.exp2(call.sink.float()[..., None] * LOG2_E - lse_two[..., :m])
    return dq, dk, dv, -(share * delta[..., :m]).sum(2)


def launch(
    call: Call, choice: Choice, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse_two: Tensor, delta: Tensor,
    sums: Tensor | None, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel that sums dk and dv, and adds dq to ``sums`` if there are any."""
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    tall, half = choice.tile_m, choice.tile_n // 2
    part = [tall // 2, padded(d)] if tall == 128 else [tall, padded(d) // 2]
    key_tiles = triton.cdiv(n, choice.tile_n)
    seers = None if call.rows is None else sight(call.rows, call.interval[4], n, choice.tile_n)
    scale, inner, outer = call.factors
    backward_kernel[(key_tiles * g * b,)](
        describe(q, tall, padded(d)), describe(k, half, padded(d)), describe(v, half, padded(e)),
        describe(d_out, tall, padded(e)),
        describe_lines(lse_two.flatten(0, 1), [1, tall]), describe_lines(delta.flatten(0, 1), [1, tall]),
        None if sums is None else describe_lines(sums.flatten(0, 2), part),
        describe(dk, half, padded(d)), describe(dv, half, padded(e)),
        call.alibi, call.rows, call.sequences, seers,
        per_sequence(call.alibi), h, h // g, m, lse_two.shape[2], *call.interval, b * m,
        -scale if call.negative else scale, inner, outer, call.scale, key_tiles, b, choice.together,
        M=tall, N=choice.tile_n, D=padded(d), E=padded(e), STAGES=choice.stages,
        ROWS=call.rows is not None, EACH=call.sequences is not None, KEEP=call.lowered.keep > 0,
        SOFTCAP=call.softcap is not None, ALIBI=call.alibi is not None, DEAD=not all_seen(call.lowered, m, n),
        ADD=sums is not None, num_warps=4,
    )  # fmt: skip


def describe_lines(x: Tensor, block: list[int]) -> Any:
    """Describe a float32 matrix to the copy engine in tiles."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float32)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
