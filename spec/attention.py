"""Exact attention: ``softmax(q kᵀ · scale) v`` (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

With what long-context models add to it: grouped heads (arXiv:2305.13245), masks, soft-capped scores
(Gemma 2, arXiv:2408.00118, §2), ALiBi (arXiv:2108.12409, §3) and attention sinks (gpt-oss).
Shapes: b batch, h query heads, g key heads (h = g · r), m queries, n keys, d head dimension, e value dimension.
"""

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .bounds import Bounds, bounds, visible
from .checks import check_attention, floating
from .masks import Mask, everything
from .state import AttentionState, add_sink, log_sum_exp, weights


def attention(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n e"],
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    q_offset: int | Int[Tensor, " b"] | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,  # noqa: ARG001 - the definition always is
) -> AttentionState:
    """Attend from every query to the keys that it sees.

    Args:
        q: Queries.
        k: Keys; query head c reads key head ``c // (h / g)``.
        v: Values.
        mask: Which keys a query sees.
        scale: Multiplies ``q · k``; 1/√d by default.
        softcap: Replaces a scaled score s by ``softcap · tanh(s / softcap)``.
        sink: One more score per head, in the denominator and the log-sum-exp, whose value is 0.
        alibi: Slope per head; ``-slope · |i - j|`` is added after the softcap, i and j being positions.
        q_offset: Position of the first query; by default the queries are the last of the keys.
        k_offset: Position of the first key given: a slice of the keys keeps its coordinates.
        out_dtype: Dtype of ``out``; that of q by default. States to be merged want float32.
        deterministic: Ask for a gradient that is bitwise repeatable.

    Returns:
        ``out``, and ``lse``: the natural log-sum-exp of the scaled, capped, biased scores, float32 (float64
        for float64). A row that sees no key is out = 0, lse = -inf, with gradient 0. A key that no query of
        its sequence sees may hold NaN and changes nothing; one that some query sees must be finite.

    Raises:
        ValueError: For parts that do not fit each other.
    """
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    seen = bounds(mask, q.shape[0], q.shape[2], k.shape[2], q_offset=q_offset, k_offset=k_offset, device=q.device)
    hidden = rearrange(~visible(seen, k.shape[2]), "b m n -> b 1 1 m n")
    dead = rearrange(hidden.all(dim=3), "b 1 1 n -> b 1 n 1")  # no query sees it: not even its NaN
    k, v = (x.to(floating(q)).masked_fill(dead, 0.0) for x in (k, v))
    score = scores(q.to(floating(q)), k, scale=scale, softcap=softcap)
    if alibi is not None:
        score = score - penalty(alibi.to(score.dtype), seen, k)
    score = score.masked_fill(hidden, -torch.inf)
    lse = log_sum_exp(score)
    mean = einsum(weights(score, lse), v, "b g r m n, b g n e -> b g r m e")
    state = AttentionState(rearrange(mean, "b g r m e -> b (g r) m e"), rearrange(lse, "b g r m -> b (g r) m"))
    state = state if sink is None else add_sink(state, sink)
    return AttentionState(state.out.to(q.dtype if out_dtype is None else out_dtype), state.lse)


def scores(
    q: Float[Tensor, "b h m d"], k: Float[Tensor, "b g n d"], *, scale: float | None, softcap: float | None
) -> Float[Tensor, "b g r m n"]:
    """Scaled, capped product of every query with every key of its group."""
    q = rearrange(q, "b (g r) m d -> b g r m d", g=k.shape[1])
    score = einsum(q, k, "b g r m d, b g n d -> b g r m n") * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return score if softcap is None else softcap * (score / softcap).tanh()


def penalty(slope: Float[Tensor, " h"], seen: Bounds, k: Float[Tensor, "b g n d"]) -> Float[Tensor, "b g r m n"]:
    """ALiBi: ``slope · |i - j|`` for query position i and key position j."""
    i = rearrange(seen.position, "b m -> b 1 1 m 1")
    j = torch.arange(k.shape[2], device=k.device)
    return rearrange(slope, "(g r) -> g r 1 1", g=k.shape[1]) * (i - j).abs()
