"""The launches of the backward pass of the backend `hopper`, which serves whatever the forward pass does.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

from ..flash.backward import launch_queries
from ..flash.decode_choices import processors
from ..flash.launch import LOG2_E, per_sequence
from ..flash.reach import all_seen
from ..flash.sight import sight
from .backward_kernel import backward_kernel
from .backward_passes import finish_kernel, prepare_kernel
from .backward_wide_kernel import backward_wide_kernel
from .gluon import VERSION, TensorDescriptor, gl
from .launch import Call, declines_address, describe, padded

NARROW: Final = 128  # of a head, keys or values: what one warpgroup can sum dK and dV of
LINES: Final = 128  # rows of a head are padded to a multiple of it, and so of every tile


class Choice(NamedTuple):
    """How the kernel is launched.

    Attributes:
        tile_m: Queries of a tile.
        tile_n: Keys of a tile.
        stages: Tiles of queries in the ring.
        together: Heads that are worked on at the same time; see `backward_tiles.assignment`.
        persistent: Whether a block of threads takes tile after tile of keys, fetches the next meanwhile, and adds to dq
            from registers; or one tile, and has a warp of its own that adds to dq from shared memory.
    """

    tile_m: int
    tile_n: int = 128
    stages: int = 2
    together: int = 4
    persistent: bool = False


def choose(d: int, e: int, *, plain: bool = True, even: bool = False) -> Choice:
    """Choose how the kernel is launched for heads of d and values of e columns.

    ``plain`` says that nothing else needs registers, as bounds of rows and a softcap do; ``even`` that all keys are
    seen by as many queries. Triton 3.9 needs more registers than 3.6, for which this was measured (`docs/notes.md`).
    """
    if max(d, e) > NARROW:
        return Choice(tile_m=64, tile_n=64)
    if max(padded(d), padded(e)) > 64:
        return Choice(tile_m=64)
    return Choice(tile_m=128 if plain and VERSION < (3, 8) else 64, together=4 if even else 16, persistent=True)


def widths(d: int, e: int) -> tuple[int, int]:
    """Columns of tiles: powers of two, and at least two swizzle atoms where each warpgroup has half of them."""
    least = NARROW if max(d, e) > NARROW else 0
    return max(padded(d), least), max(padded(e), least)


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    choice: Choice,
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
        choice: How the kernel is launched; see `backward_choices.chosen`.

    Returns:
        Gradients of q, k and v, contiguous, and of the sinks by sequence, ``[b, h]``, or ``[b, 0]`` without sinks.
    """
    b, h, m, e = out.shape
    width = widths(q.shape[3], e)[0]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_out = d_out.to(v.dtype)
    d_out = d_out if declines_address("d_out", d_out) is None else d_out.contiguous()
    lines = triton.cdiv(m, LINES) * LINES
    lse_two, delta = lse.new_empty(2, b, h, lines)
    if b * h * m:
        d_lse = None if d_lse is None else d_lse.contiguous()
        prepare_kernel[(b * h * lines // 32,)](
            out, d_out, lse, d_lse, lse_two, delta, *d_out.stride()[:3], h, m, lines, e,
            R=32, E=padded(e), D_LSE=d_lse is not None,
        )  # fmt: skip
    if out.numel() and dk.numel():
        # The sums of dq, and behind them the number of tiles that were handed out.
        count = 0 if call.deterministic else b * h * lines * width
        zeros = lse.new_zeros(count + 4)
        sums = zeros[:count] if count else None
        launch(call, choice, q, k, v, d_out, lse_two, delta, sums, zeros[count:].view(torch.int32), dk, dv)
        if sums is None:
            launch_queries(call, q, k, v, d_out, lse_two[..., :m], delta[..., :m], dq)
        else:
            parts = 4 if choice.tile_n == 64 else 1 if choice.tile_m == 128 else 2
            finish_kernel[(b * h * lines // 64,)](
                sums, dq, m, lines, q.shape[3], call.scale, D=width, PARTS=parts, num_warps=8
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
    sums: Tensor | None, counter: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Launch the kernel that sums dk and dv, and adds dq to ``sums`` if there are any."""
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    tall, wide = choice.tile_m, choice.tile_n
    columns, value_columns = widths(d, e)
    key_tiles = triton.cdiv(n, wide)
    items = key_tiles * g * b
    seers = None if call.rows is None else sight(call.rows, call.interval[4], n, wide)
    scale, inner, outer = call.factors
    masks = (call.alibi, call.rows, call.sequences, seers)
    numbers = (
        per_sequence(call.alibi), h, h // g, m, lse_two.shape[2], *call.interval, b * m,
        -scale if call.negative else scale, inner, outer, call.scale, key_tiles, b, choice.together,
    )  # fmt: skip
    lines = [describe_lines(x.flatten(0, 1), [1, tall]) for x in (lse_two, delta)]
    flags = {
        "M": tall, "N": wide, "D": columns, "E": value_columns, "STAGES": choice.stages,
        "ROWS": call.rows is not None, "EACH": call.sequences is not None, "KEEP": call.lowered.keep > 0,
        "SOFTCAP": call.softcap is not None, "ALIBI": call.alibi is not None,
        "DEAD": not all_seen(call.lowered, m, n), "ADD": sums is not None, "num_warps": 4,
    }  # fmt: skip
    if max(d, e) > NARROW:
        columns, value_columns = columns // 2, value_columns // 2
        backward_wide_kernel[(items,)](
            describe(q, tall, columns), describe(k, wide, columns), describe(v, wide, value_columns),
            describe(d_out, tall, value_columns), *lines, sums,
            describe(dk, wide, columns), describe(dv, wide, value_columns), *masks, *numbers, **flags,
        )  # fmt: skip
        return
    half = wide // 2
    added = sums
    if sums is not None and not choice.persistent:
        added = describe_lines(sums.view(-1, 128), [tall * columns // 256, 128], linear=True)
    backward_kernel[(min(items, processors(q.device.index)) if choice.persistent else items,)](
        describe(q, tall, columns), describe(k, half, columns), describe(v, half, value_columns),
        describe(d_out, tall, value_columns), *lines, added,
        describe(dk, half, columns), describe(dv, half, value_columns), *masks, counter, *numbers, **flags,
        PERSISTENT=choice.persistent,
    )  # fmt: skip


def describe_lines(x: Tensor, block: list[int], *, linear: bool = False) -> Any:
    """Describe a float32 matrix to the copy engine in tiles, which lie row after row in shared memory if ``linear``."""
    default = gl.NVMMASharedLayout.get_default_for(block, gl.float32)
    layout = gl.NVMMASharedLayout(0, 32, 2) if linear else default
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
