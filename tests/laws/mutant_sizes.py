"""Attention that is right for some sizes, layouts or options only; see `longspan.laws.mutants`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.spec import AttentionState, attention

from .mutant_attention import part, rounded


class Hook(torch.autograd.Function):
    """The identity, whose gradient passes through a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return x."""
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        """Change the gradient."""
        return ctx.change(d_x), None


def hook(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the gradient that reaches x."""
    return Hook.apply(x, change)


def first_only(x: Tensor, count: int, dim: int) -> Tensor:
    """Zero all but the first entries along a dimension."""
    kept = torch.arange(x.shape[dim], device=x.device) < count
    return x * kept.reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def v_read_with_strides_of_k(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Read values by the strides of the keys."""
    if v.shape == k.shape and v.stride() != k.stride():
        v = first_only(v, 1, 2)
    return attention(q, k, v, **options)


def d_out_read_as_contiguous(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Read the cotangent as if it lay in a row."""
    state = attention(q, k, v, **options)
    return AttentionState(hook(state.out, lambda g: g if g.is_contiguous() else g * torch.nan), state.lse)


def rows_past_192_zero(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Launch a grid that is too short for a long prompt."""
    state = attention(q, k, v, **options)
    return AttentionState(first_only(state.out, 192, 2), state.lse)


def second_key_tile_of_a_prompt_dropped(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Leave the loop over keys after 256 of them, unless decoding."""
    if k.shape[2] <= 256 or q.shape[2] <= 16:
        return attention(q, k, v, **options)
    return rounded(part(q, k, v, slice(0, 256), options), q, options)


def dk_of_keys_past_192_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Write gradients of the first 192 keys only."""
    return attention(q, hook(k, lambda g: first_only(g, 192, 2)), v, **options)


def dq_of_rows_past_192_lost(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Write gradients of the first 192 queries only."""
    return attention(hook(q, lambda g: first_only(g, 192, 2)), k, v, **options)


def groups_of_more_than_4_heads_wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Serve the first four query heads of a key head."""
    state, r = attention(q, k, v, **options), q.shape[1] // k.shape[1]
    served = torch.arange(q.shape[1], device=q.device) % r < 4
    return AttentionState(state.out * served[:, None, None], state.lse)


def more_than_3_sequences_wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Serve the first three sequences of a batch."""
    state = attention(q, k, v, **options)
    return AttentionState(first_only(state.out, 3, 0), state.lse)


def far_offsets_wrap_int16(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Keep the position of the first key in 15 bits."""
    return attention(q, k, v, **{**options, "k_offset": options.get("k_offset", 0) % 2**15})


def out_dtype_rounded_first(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Round to the dtype of the inputs, and then widen."""
    return rounded(attention(q, k, v, **{**options, "out_dtype": None}), q, options)


def gradient_with_out_dtype_wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Double the gradient where out has a dtype of its own."""
    state = attention(q, k, v, **options)
    return state if state.out.dtype == q.dtype else AttentionState(hook(state.out, lambda g: 2 * g), state.lse)


def gradient_of_all_or_nothing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """Save for a backward pass only where all of q, k and v need one."""
    state = attention(q, k, v, **options)
    if q.requires_grad and k.requires_grad and v.requires_grad:
        return state
    return AttentionState(state.out.detach(), state.lse.detach())
