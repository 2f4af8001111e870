"""Attention tiled over PyTorch's kernels: every part is one call, and log-sum-exps join the parts of a row.

Forward: parts of a tile are merged in float32 (`longspan.spec.merge`). Backward: with the out and the LSE of the whole
row, a kernel's backward gives the exact gradient of its part, ``P = exp(s - lse)`` and ``dS = P ∘ (dP - delta)``
(FlashAttention-2, arXiv:2307.08691, Algorithm 2). The kernels compute ``delta = rowsum(dO ∘ O)`` themselves; a gradient
through the LSE, which subtracts dLSE from delta, goes in as one more column of O beside a column of ones in dO.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from longspan.spec import AttentionState, Bounds, add_sink, merge, visible
from longspan.spec.checks import floating

from .kernels import DEVICES, compute_dtype, kernel, laid
from .tiles import Part, Tile, tiles


class Sequences(NamedTuple):
    """Sequences of the batch that see alike: what each row sees, where it is needed, and the plan."""

    batch: slice
    seen: Bounds
    tiles: list[Tile]


class Call(NamedTuple):
    """One part of one tile, as a kernel takes it."""

    rows: tuple[slice, slice, slice]
    keys: tuple[slice, slice, slice]
    causal: bool
    shown: Tensor | None


def plan(seen: Bounds, device: torch.device) -> list[Sequences]:
    """Plan every sequence of the batch, alike ones together; the bounds are on the CPU."""
    result, start = [], 0
    b = seen.first.shape[0]
    rows = (seen.first, seen.last, seen.base)
    for stop in range(1, b + 1):
        if stop < b and all(torch.equal(x[start], x[stop]) for x in rows):
            continue
        first, last, base = (x[start : start + 1] for x in rows)
        one = Bounds(first, last, base, seen.keep, base)
        there = Bounds(first.to(device), last.to(device), base.to(device), seen.keep, base)
        result.append(Sequences(slice(start, stop), there, tiles(one, DEVICES[device.type].rows)))
        start = stop
    return result


def calls(of: Sequences, tile: Tile) -> list[Call]:
    """List the calls that make a tile."""
    rows = slice(tile.start, tile.stop)
    return [
        Call(
            (of.batch, slice(None), rows),
            (of.batch, slice(None), slice(part.start, part.stop)),
            part.kind == "causal",
            shown(of.seen, rows, part) if part.kind == "cut" else None,
        )
        for part in tile.parts
    ]


def shown(seen: Bounds, rows: slice, part: Part) -> Tensor:
    """Write out which keys of a part each row of its tile sees, [rows, keys]."""
    first, last, base = (x[:, rows] - part.start for x in (seen.first, seen.last, seen.base))
    return visible(Bounds(first, last, base, seen.keep, base), part.stop - part.start)[0]


class TiledAttention(torch.autograd.Function):
    """``(q, k, v, sink, scale, sequences) → (out, lse)``, out in the dtype in which parts are merged."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, scale: float, sequences: list[Sequences]
    ) -> tuple[Tensor, Tensor]:
        """Compute and merge every part."""
        wide, e = floating(q), v.shape[-1]
        out = torch.zeros(*q.shape[:3], e, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
        q, k, v, scale = prepared(q, k, v, scale, extra=0)
        for of in sequences:
            for tile in of.tiles:
                states = [attend(q, k, v, call, scale, wide) for call in calls(of, tile)]
                state = merge(*states) if len(states) > 1 else states[0]
                rows = (of.batch, slice(None), slice(tile.start, tile.stop))
                out[rows], lse[rows] = state.out[..., :e], state.lse
        state = AttentionState(out, lse) if sink is None else add_sink(AttentionState(out, lse), sink)
        return state.out, state.lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward reads."""
        q, k, v, sink, scale, sequences = inputs
        ctx.save_for_backward(q, k, v, sink, *output)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.sequences = scale, sequences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add up the gradients of the parts."""
        q, k, v, sink, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        grads = gradients((q, k, v), AttentionState(out, lse), (d_out, d_lse), ctx.scale, ctx.sequences)
        d_sink = None
        if sink is not None:
            delta = (d_out * out).sum(-1) - (0 if d_lse is None else d_lse)
            share = (rearrange(sink.to(lse.dtype), "h -> h 1") - lse).exp()
            d_sink = -(share * delta).sum((0, 2)).to(sink.dtype)
        return *grads, d_sink, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Call once per sample: a sample is a batch of its own already."""
        samples = [
            TiledAttention.apply(
                *(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        out, lse = zip(*samples, strict=True)
        return (torch.stack(out), torch.stack(lse)), (0, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, wide: torch.dtype) -> AttentionState:
    """Compute one part."""
    keys, values, bias = masked(k[call.keys], v[call.keys], call.shown)
    forward = kernel(q, masked=bias is not None).forward
    out, lse = forward(q[call.rows], keys, values, bias, call.causal, scale)
    out, lse = out.to(wide), lse.to(wide)
    if call.shown is not None:  # kernels disagree on rows that see nothing
        blind = rearrange(~call.shown.any(1), "m -> m 1")
        out, lse = out.masked_fill(blind, 0.0), lse.masked_fill(blind[:, 0], -torch.inf)
    return AttentionState(out, lse)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor], state: AttentionState, cotangents: tuple[Tensor, Tensor | None],
    scale: float, sequences: list[Sequences],
) -> list[Tensor]:  # fmt: skip
    """Compute dq, dk and dv, added up in float32, from the out and the LSE of the whole."""
    total = [torch.zeros_like(x, dtype=floating(x), memory_format=torch.contiguous_format) for x in inputs]
    (d_out, d_lse), sign = cotangents, sign_of(scale)
    q, k, v, scale = prepared(*inputs, scale, extra=0 if d_lse is None else 2)
    out, d_out = state.out.to(v.dtype), d_out.to(v.dtype)
    if d_lse is not None:  # two columns: what the first loses to rounding is in the second
        high = (-d_lse).to(v.dtype)
        low = (-d_lse - high).to(v.dtype)
        out, d_out = torch.cat([out, torch.stack([high, low], -1)], -1), pad(d_out, (0, 2), value=1.0)
    out, d_out = (laid(widened(x, v.shape[-1])) for x in (out, d_out))
    lse = state.lse.masked_fill(state.lse == -torch.inf, 0.0)  # exp(-inf - 0) is 0, exp(-inf + inf) is not
    for of in sequences:
        for tile in of.tiles:
            for call in calls(of, tile):
                keys, values, bias = masked(k[call.keys], v[call.keys], call.shown)
                grads = kernel(q, masked=bias is not None).backward(
                    d_out[call.rows], q[call.rows], keys, values, bias, out[call.rows], lse[call.rows], call.causal,
                    scale,
                )  # fmt: skip
                for x, at, grad in zip(total, (call.rows, call.keys, call.keys), grads, strict=True):
                    x[at] += grad[..., : x.shape[-1]]
    total[0] *= sign
    return [x.to(like.dtype) for x, like in zip(total, inputs, strict=True)]


def masked(k: Tensor, v: Tensor, shown: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn what a cut part shows into a bias, and clean keys that none of its rows sees: 0 · NaN is NaN."""
    if shown is None:
        return k, v, None
    bias = torch.zeros(shown.shape, dtype=k.dtype, device=k.device).masked_fill(~shown, -torch.inf)
    unseen = rearrange(~shown.any(0), "n -> n 1")
    return k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0), bias


def prepared(q: Tensor, k: Tensor, v: Tensor, scale: float, *, extra: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Bring q, k and v to one head dimension, with room for extra value columns, in the dtype of the kernels.

    Kernels scale the row maximum after they find it, so only a positive scale is safe: the sign goes to q.
    """
    dtype, multiple = compute_dtype(q), DEVICES[q.device.type].multiple
    size = max(q.shape[-1], v.shape[-1] + extra)
    size += -size % multiple
    sign = sign_of(scale)
    q = q if sign == 1 else q * sign
    q, k, v = (widened(x.to(dtype), size) for x in (q, k, v))
    q, k, v = (laid(x) for x in (q, k, v))
    return q, k, v, abs(scale) or 1.0


def widened(x: Tensor, size: int) -> Tensor:
    """Pad the last dimension with zeros, which add nothing to a product; `pad` by nothing would copy."""
    return pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x


def sign_of(scale: float) -> int:
    """Sign of the scale."""
    return (scale > 0) - (scale < 0)
