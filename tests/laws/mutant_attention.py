"""Attention that computes in a wrong way what its mask shows; see `longspan.laws.mutants`."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from longspan.spec import AttentionState, add_sink, attention, merge

from .mutant_masks import placed


def part(q: Tensor, k: Tensor, v: Tensor, keys: slice, options: dict[str, Any], **changed: Any) -> AttentionState:
    """Attention to a slice of the keys, in float32."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    offsets = {"q_offset": placed(k, q, options), "k_offset": options.get("k_offset", 0) + (keys.start or 0)}
    return attention(q, k[:, :, keys], v[:, :, keys], **{**options, **offsets, "out_dtype": wide, **changed})


def rounded(state: AttentionState, q: Tensor, options: dict[str, Any]) -> AttentionState:
    """Give a state the dtype that was asked for."""
    return AttentionState(state.out.to(options.get("out_dtype") or q.dtype), state.lse)


def lse_in_base_2(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Return the logarithm to base 2, as kernels keep it."""
    state = attention(q, k, v, **options)
    return AttentionState(state.out, state.lse / math.log(2))


def sink_missing_from_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Count the sink in the denominator and not in the log-sum-exp."""
    return AttentionState(attention(q, k, v, **options).out, attention(q, k, v, **{**options, "sink": None}).lse)


def sink_missing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Ignore the sink."""
    return attention(q, k, v, **{**options, "sink": None})


def sink_in_every_part(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Split the keys, and count the sink once per part."""
    half = k.shape[2] // 2
    parts = (part(q, k, v, keys, options) for keys in (slice(0, half), slice(half, None)))
    return rounded(merge(*parts), q, options)


def softcap_before_scale(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Cap the product, then scale it."""
    scale = options.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    cap = options.get("softcap")
    if cap is None or scale == 0:
        return attention(q, k, v, **options)
    return attention(q, k, v, **{**options, "softcap": cap * abs(scale)})


def tail_tile_dropped(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Read whole tiles of 16 keys only."""
    whole = k.shape[2] - k.shape[2] % 16
    return rounded(part(q, k, v, slice(0, whole), options), q, options)


def split_not_merged(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Split the keys, and return the last part's answer."""
    half = k.shape[2] // 2
    return rounded(part(q, k, v, slice(half, None), options), q, options)


def rescale_forgotten(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Sum under each tile's own peak, without rescaling to the common one."""
    half = k.shape[2] // 2
    first, second = (part(q, k, v, keys, options, sink=None) for keys in (slice(0, half), slice(half, None)))
    state = merge(first, AttentionState(second.out, torch.minimum(second.lse, first.lse + 1)))
    state = state if options.get("sink") is None else add_sink(state, options["sink"])
    return rounded(state, q, options)


def full_tile_skipped(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Take the first tile of 32 keys for an empty one where it is full."""
    if k.shape[2] < 64:
        return attention(q, k, v, **options)
    return rounded(part(q, k, v, slice(32, None), options), q, options)


def scale_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Scale by 1/√d whatever was asked."""
    return attention(q, k, v, **{**options, "scale": None})


def scale_of_the_value_dim(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Scale by the value dimension."""
    return attention(q, k, v, **{**options, "scale": options.get("scale") or 1 / math.sqrt(v.shape[-1])})


def alibi_before_softcap(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Cap ALiBi's distances with the scores: here, lose them altogether beside a cap."""
    capped = options.get("softcap") is not None
    return attention(q, k, v, **{**options, "alibi": None if capped else options.get("alibi")})


def float32_rounded_to_bfloat16(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Compute float32 problems in bfloat16, silently."""
    if q.dtype != torch.float32:
        return attention(q, k, v, **options)
    out_dtype = options.get("out_dtype") or torch.float32
    return attention(*(x.bfloat16() for x in (q, k, v)), **{**options, "out_dtype": out_dtype})


def heads_read_the_wrong_group(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let query head c read key head ``c mod g``."""
    r = q.shape[1] // k.shape[1]
    return attention(q, *(repeat(x, "b g n d -> b (r g) n d", r=r) for x in (k, v)), **options)


def blind_rows_are_nan(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Divide by the sum of no weights."""
    state = attention(q, k, v, **options)
    some = (state.lse != -torch.inf).to(state.out.dtype)
    return AttentionState(state.out / rearrange(some, "b h m -> b h m 1"), state.lse)


def blind_rows_see_everything(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Hide keys with a large negative number, which a row of nothing but hidden keys shares evenly."""
    state = attention(q, k, v, **options)
    mean = repeat(v.mean(2), "b g e -> b (g r) 1 e", r=q.shape[1] // k.shape[1]).nan_to_num().to(state.out.dtype)
    blind = rearrange(state.lse == -torch.inf, "b h m -> b h m 1")
    return AttentionState(torch.where(blind, mean, state.out), state.lse)


def blind_rows_have_infinite_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Return lse = +inf where no key is seen."""
    state = attention(q, k, v, **options)
    return AttentionState(state.out, state.lse.masked_fill(state.lse == -torch.inf, torch.inf))


def dead_values_times_zero(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Multiply values that nobody sees by weight zero, and NaN with them."""
    state = attention(q, k, v, **options)
    nothing = repeat((0 * v).sum(2), "b g e -> b (g r) 1 e", r=q.shape[1] // k.shape[1])
    return AttentionState(state.out + nothing.to(state.out.dtype), state.lse)


def order_of_sums_varies() -> Callable[..., AttentionState]:
    """Build a backend that sums in another order at every other call."""
    calls = itertools.count()

    def sums_in_another_order(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
        """Split the keys at another place in every call."""
        cut = next(calls) % 7 % (k.shape[2] + 1)
        parts = [part(q, k, v, keys, options, sink=None) for keys in (slice(0, cut), slice(cut, None))]
        state = merge(*parts)
        state = state if options.get("sink") is None else add_sink(state, options["sink"])
        return rounded(state, q, options)

    return sums_in_another_order


def query_scaled_in_place(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Write to the caller's queries."""
    with torch.no_grad():
        q.detach()[:1].mul_(1.0)
    return attention(q, k, v, **options)


def gradient_of_one_head_of_a_group(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Give keys the gradient of their group's first query head alone."""
    r = q.shape[1] // k.shape[1]
    copies = [rearrange([x, *[x.detach()] * (r - 1)], "r b g n d -> b (g r) n d") for x in (k, v)]
    return attention(q, *copies, **options)


def gradient_of_the_sink_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Treat the sink as a constant."""
    sink = options.get("sink")
    return attention(q, k, v, **{**options, "sink": None if sink is None else sink.detach() + 0 * sink})


class Uncapped(torch.autograd.Function):
    """Forward with the softcap, backward without."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Attend as asked."""
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return attention(q, k, v, **options)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate another function."""
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            state = attention(*leaves, **{**ctx.options, "softcap": None})
        return (*torch.autograd.grad([state.out, state.lse], leaves, [d_out, d_lse]), None)


def gradient_without_softcap(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Forget the cap in the backward pass."""
    if options.get("softcap") is None or options.get("sink") is not None:
        return attention(q, k, v, **options)
    return AttentionState(*Uncapped.apply(q, k, v, options))


def gradient_of_lse_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Let no gradient through lse."""
    state = attention(q, k, v, **options)
    return AttentionState(state.out, state.lse.detach() + 0 * state.out.sum(-1))
