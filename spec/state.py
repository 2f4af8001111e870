"""Attention on part of the keys, and how parts make the whole.

Over a set of keys, attention is the mean of their values under weights exp(score); it is known by
that mean and by the logarithm of the weights' sum. Two disjoint sets are then one set (Milakov &
Gimelshein 2018, arXiv:1805.02867, §3; FlashAttention, arXiv:2205.14135, §3.1), in any order.
Shapes: b batch, h heads, m queries, e value dimension.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .checks import FLOATS, check_tensors, floating, refuse, same_device


class AttentionState(NamedTuple):
    """Attention over some keys: the mean of the values, and the natural log-sum-exp of the scores.

    A row that saw no key is out = 0, lse = -inf: the neutral element of `merge`.
    """

    out: Float[Tensor, "b h m e"]
    lse: Float[Tensor, "b h m"]


def log_sum_exp(score: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Natural log-sum-exp over the last axis; -inf, with gradient zero, where every score is -inf."""
    empty = (score == -torch.inf).all(-1)
    # logsumexp itself would give such a row the gradient exp(-inf + inf) = NaN.
    finite = score.masked_fill(rearrange(empty, "... -> ... 1"), 0.0)
    return finite.logsumexp(-1).masked_fill(empty, -torch.inf)


def weights(score: Float[Tensor, "*rows n"], lse: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows n"]:
    """Weight of every score under a given log-sum-exp: ``exp(score - lse)``, 0 in a row that has none."""
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    return (score - rearrange(finite, "... -> ... 1")).exp()


def merge(*states: AttentionState) -> AttentionState:
    """Attention over the union of disjoint sets of keys; associative and commutative.

    Returns:
        The merged state, in the dtype of the first state's out. Merge float32 parts
        (``out_dtype=torch.float32``): parts that were rounded to bfloat16 stay rounded.

    Raises:
        ValueError: For no state at all, or states of different shapes.

    >>> from longspan import spec
    >>> q, k, v = torch.randn(3, 1, 1, 8, 4, dtype=torch.float64)
    >>> parts = [spec.attention(q, k[:, :, some], v[:, :, some]) for some in (slice(0, 5), slice(5, 8))]
    >>> torch.allclose(merge(*parts).out, spec.attention(q, k, v).out)
    True
    """
    check_states(*states)
    lse = torch.stack([state.lse for state in states], dim=-1)
    total = log_sum_exp(lse)
    share = weights(lse, total)
    out = torch.stack([state.out.to(floating(lse)) for state in states], dim=-1)
    merged = (out * rearrange(share, "... s -> ... 1 s")).sum(-1)
    return AttentionState(merged.to(states[0].out.dtype), total)


def add_sink(state: AttentionState, sink: Float[Tensor, " h"]) -> AttentionState:
    """Add one key of value 0 and score ``sink`` to every row of a head (attention sinks, gpt-oss).

    It belongs to the whole and not to a part: merge first, add the sink once, last.

    Raises:
        ValueError: For a sink that is not one number per head.
    """
    check_sink(state, sink)
    score = rearrange(sink.to(state.lse.dtype), "h -> h 1").expand_as(state.lse)
    nothing = AttentionState(torch.zeros_like(state.out), score)
    return merge(state, nothing)


def check_states(*states: object) -> None:
    """Refuse what cannot be merged: nothing, what is no state, and states that do not fit each other."""
    if not states:
        refuse("merge", "given at least one state", "none")
    for state in states:
        check_state(state)
    parts = [state for state in states if isinstance(state, AttentionState)]
    same_device(**{f"{name} {i}": x for i, state in enumerate(parts) for name, x in state._asdict().items()})
    if any(state.out.shape != parts[0].out.shape or state.lse.shape != parts[0].out.shape[:-1] for state in parts):
        refuse("states", "of one shape", [list(state.out.shape) for state in parts])


def check_sink(state: AttentionState, sink: Tensor) -> None:
    """Refuse a sink that is not one number per head of a state."""
    check_state(state)
    if state.out.ndim != 4:
        refuse("out of a state", "[b, h, m, e]; of a ragged batch, [1, h, tokens, e]", list(state.out.shape))
    check_tensors(sink=sink)
    same_device(state=state.out, sink=sink)
    if list(sink.shape) != [state.out.shape[1]] or sink.dtype not in FLOATS:
        refuse("sink", f"one floating number per head, [{state.out.shape[1]}]", f"{sink.dtype} {list(sink.shape)}")


def check_state(state: object) -> None:
    """Refuse what is no state."""
    if not isinstance(state, AttentionState):
        refuse("a state", "AttentionState(out, lse), each an argument of its own", type(state).__name__)
