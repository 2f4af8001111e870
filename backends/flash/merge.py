# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The merge of attention over disjoint keys, any number of parts in one launch (Milakov & Gimelshein 2018, §3).

Each part is read once, where it lies, and the whole written once; the specification's formula in separate torch
operations stacks the parts first and passes over them six times. Parts of few-query attention are merged by that
kernel itself; this serves rings, shards and cascades. The gradient is a formula in torch operations, and so is
the merge itself in a graph that `torch.compile` captures, where the compiler fuses it.
Shapes: b batch, h heads, m queries, e value dimension; in tiles R rows, C columns.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.state import check_sink, check_states, weights

from ..registry import serve
from .merge_choices import choose_merge
from .plan import planned
from .rope import declines_heads
from .rope_function import PLAIN, fold, watched
from .rope_kernel import on, power_of_two

AT_ONCE: Final = 16  # parts of one launch; a kernel is compiled for each number of them


@triton.jit
def rows_of(place, stride):
    """Offset of each row (b, h, m) under a triple of strides."""
    return place[0] * stride[0] + place[1] * stride[1] + place[2] * stride[2]


@planned
@triton.jit(do_not_specialize=["rows", "h", "m", "sink_b", "sink_h"])
def merge_kernel(
    outs, lses, sink, out, lse, rows, h, m, out_strides, lse_strides, sink_b, sink_h, whole_strides,
    N: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_R rows of N parts, and a sink per head where there is one."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
    live = row < rows
    head = row // m
    place = (head // h, head % h, row % m)
    column = tl.arange(0, BLOCK_C)
    keep = live[:, None] & (column < E)[None, :]
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for part in tl.static_range(N):
        top = tl.maximum(top, tl.load(lses[part] + rows_of(place, lse_strides[part]), live, float("-inf")))
    if sink is not None:
        score = tl.load(sink + place[0] * sink_b + place[1] * sink_h, live, float("-inf")).to(tl.float32)
        top = tl.maximum(top, score)
    shift = tl.where(top == float("-inf"), 0.0, top)  # a row without keys has weights exp(-inf - 0) = 0
    total = tl.zeros([BLOCK_R], tl.float32)
    if sink is not None:
        total += tl.exp(score - shift)
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for part in tl.static_range(N):
        weight = tl.exp(tl.load(lses[part] + rows_of(place, lse_strides[part]), live, float("-inf")) - shift)
        values = tl.load(outs[part] + rows_of(place, out_strides[part])[:, None] + column[None, :], keep, 0.0)
        total += weight
        mean += weight[:, None] * values.to(tl.float32)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    mean = mean / total[:, None]
    target = out + rows_of(place, whole_strides)[:, None] + column[None, :]
    tl.store(target, mean.to(out.dtype.element_ty), keep)
    tl.store(lse + row, tl.where(empty, float("-inf"), shift + tl.log(total)), live)


def merge(*states: AttentionState) -> AttentionState:
    """Attention over the union of disjoint sets of keys in one launch; see `longspan.spec.merge`.

    Args:
        states: Parts, ``out [b, h, m, e]`` in fp16, bf16 or fp32 with a unit last stride, ``lse [b, h, m]`` in fp32;
            or of ragged batches, ``out [tokens, h, e]`` and ``lse [tokens, h]``.

    Raises:
        ValueError: For no state at all, or states of different shapes.
        Unsupported: For what `declines_merge` names.
    """
    serve(declines_merge(*states))
    if states[0].out.ndim == 3:  # ragged: rows [tokens, h], which the kernel counts as it counts those of a batch
        whole_state = merge(*(AttentionState(out.unsqueeze(0), lse.unsqueeze(0)) for out, lse in states))
        return AttentionState(whole_state.out.squeeze(0), whole_state.lse.squeeze(0))
    dtype = states[0].out.dtype
    while len(states) > AT_ONCE:
        states = (whole(states[:AT_ONCE], None, torch.float32), *states[AT_ONCE:])
    return whole(states, None, dtype)


def add_sink(state: AttentionState, sink: Tensor) -> AttentionState:
    """Add one key of value 0 and score ``sink`` to every row of a head; see `longspan.spec.add_sink`."""
    serve(declines_add_sink(state, sink))
    return whole((state,), sink.expand(state.out.shape[0], -1), state.out.dtype)


def declines_merge(*states: AttentionState) -> str | None:
    """Say why `merge` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_states(*states)
    for state in states:
        if state.lse.dtype != torch.float32:
            return f"flash.merge reads a float32 lse, got {state.lse.dtype}"
    return declines_heads("merge", *(state.out for state in states))


def declines_add_sink(state: AttentionState, sink: Tensor) -> str | None:
    """Say why `add_sink` would raise `Unsupported`, or None; see `declines_merge`."""
    check_sink(state, sink)
    if sink.dtype == torch.float64:
        return "flash.add_sink reads a sink in fp16, bf16 or fp32, got torch.float64"
    return declines_merge(state)


def whole(states: tuple[AttentionState, ...], sink: Tensor | None, dtype: torch.dtype) -> AttentionState:
    """Merge at most AT_ONCE states and a sink [b, h] into one state of a dtype."""
    if torch.compiler.is_compiling() or type(states[0].out) not in PLAIN:
        out, lse = formula(states, sink)
        return AttentionState(out.to(dtype), lse)
    outs, lses = tuple(state.out for state in states), tuple(state.lse for state in states)
    if watched(*outs, *lses, *(() if sink is None else (sink,))):
        return AttentionState(*Merge.apply(sink, dtype, *outs, *lses))
    return AttentionState(*launch(outs, lses, sink, dtype))


def formula(states: tuple[AttentionState, ...], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge by torch operations in float32: what a compiled graph records, for its compiler to fuse."""
    scores = [state.lse for state in states]
    if sink is not None:  # its value is 0: it has a share, and adds nothing
        scores.append(sink.float().unsqueeze(-1).expand_as(scores[0]))
    score = torch.stack(scores, dim=-1)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    score = score.masked_fill(empty, 0.0)  # a row of -inf alone would have the gradient NaN
    share = score.softmax(-1).masked_fill(empty, 0.0).unsqueeze(-2).unbind(-1)
    parts = [weight * state.out.float() for weight, state in zip(share, states, strict=False)]
    lse = score.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return sum(parts[1:], start=parts[0]), lse


class Merge(torch.autograd.Function):
    """The merge of n parts, given as n outs, then n log-sum-exps; differentiable in these and the sink."""

    @staticmethod
    def forward(sink: Tensor | None, dtype: torch.dtype, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Launch."""
        return launch(parts[: len(parts) // 2], parts[len(parts) // 2 :], sink, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep parts and whole."""
        sink, _, *parts = inputs
        ctx.save_for_backward(sink, *output, *parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Share the gradient of the mean by weight; that of a score is weight · (dO · (part - whole) + dlse)."""
        (sink, out, lse, *parts), (d_out, d_lse) = ctx.saved_tensors, grads
        d_mean, mean = d_out.float(), out.float()
        score = d_lse - (d_mean * mean).sum(-1)  # what a part of value 0 would get
        d_outs, d_lses = [], []
        for part, part_lse in zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True):
            weight = weights(part_lse.unsqueeze(-1), lse)
            d_outs.append((weight * d_mean).to(part.dtype))
            d_lses.append(weight.squeeze(-1) * (score + (d_mean * part.float()).sum(-1)))
        d_sink = None
        if sink is not None:
            spread = sink.float().unsqueeze(-1).expand(lse.shape)
            d_sink = (weights(spread.unsqueeze(-1), lse).squeeze(-1) * score).sum(-1).to(sink.dtype)
        return d_sink, None, *d_outs, *d_lses

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        """Fold the mapped dimension into the batch."""
        size, (sink, dtype, *parts) = info.batch_size, args
        b = parts[0].shape[0] if dims[2] is None else parts[0].movedim(dims[2], 0).shape[1]
        sink = None if sink is None else spread_over(sink, dims[0], size, b)
        flat = [spread_over(part, dim, size, b) for part, dim in zip(parts, dims[2:], strict=True)]
        merged = Merge.apply(sink, dtype, *flat)
        return tuple(one.unflatten(0, (size, b)) for one in merged), (0, 0)


def spread_over(x: Tensor, dim: int | None, size: int, b: int) -> Tensor:
    """Fold a mapped dimension into the batch, or repeat the batch where there is none; see `fold`."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x
    return fold(x, 0 if dim is None else dim, size, b, 0, batched=True).contiguous()


def launch(
    outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], sink: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launch the kernel."""
    b, h, m, e = outs[0].shape
    out = torch.empty_like(outs[0], dtype=dtype)
    lse = torch.empty((b, h, m), dtype=torch.float32, device=out.device)
    if lse.numel() == 0:
        return out, lse
    with on(out.device):
        choice = choose_merge(len(outs), e, outs[0].element_size())
        merge_kernel[(-(-b * h * m // choice.rows),)](
            tuple(outs), tuple(lses), sink, out, lse, b * h * m, h, m,
            tuple(one.stride()[:3] for one in outs), tuple(one.stride() for one in lses),
            *((0, 0) if sink is None else sink.stride()), out.stride()[:3],
            N=len(outs), E=e, BLOCK_R=choice.rows, BLOCK_C=power_of_two(e), num_warps=choice.num_warps,
        )  # fmt: skip
    return out, lse
