"""How far correct arithmetic may be from the truth: an a-priori, elementwise budget.

The truth is the specification in float64. The budget is twice a first-order rounding envelope, computed in
float64 from the inputs alone: it grows with the problem's own condition and never with what an implementation
returned. With ε the rounding of the inputs' dtype, and 8·eps32 that of what is computed in float32, a weight
P is off by ``u·P``, u = ε + 8·eps32·(max|score| + |lse| + 1); roundings of different keys are independent and
add as root sum of squares.
Shapes: b batch, g key heads, r query heads of each, m queries, n keys, d head and e value dimension.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from longspan.spec import Rotation, angle, attention
from longspan.spec.attention import penalty, scores
from longspan.spec.bounds import bounds, visible
from longspan.spec.checks import floating
from longspan.spec.masks import Mask, everything
from longspan.spec.state import weights

ANGLE = 3e-7  # radians: what the contract allows an angle to be off, at any position below 2^31


class Bound(NamedTuple):
    """A true value and how far from it each element may be."""

    truth: Tensor
    budget: Tensor


def worst(name: str, actual: Tensor, bound: Bound) -> float:
    """Return the largest error as a fraction of its budget.

    Raises:
        AssertionError: When an element exceeds its budget, is NaN, or the shapes differ.
    """
    truth, budget = bound
    if actual.shape != truth.shape:
        msg = f"{name} has shape {list(actual.shape)}, and the truth {list(truth.shape)}"
        raise AssertionError(msg)
    if not bool(torch.isfinite(budget).all()):
        msg = f"the budget of {name} is not finite: the test is wrong"
        raise ArithmeticError(msg)
    if actual.numel() == 0:
        return 0.0
    actual = actual.detach().to(truth)
    error = torch.where(actual == truth, 0.0, (actual - truth).abs())  # -inf equals -inf
    error = error.nan_to_num(nan=torch.inf, posinf=torch.inf)
    ratio = torch.where(error == 0, 0.0, error / budget).flatten()
    at = int(ratio.argmax())
    if not ratio[at] <= 1:
        where = [int(i) for i in torch.unravel_index(torch.tensor(at), truth.shape)]
        msg = (
            f"{name} exceeds budget: at {where} it is {float(actual.flatten()[at]):.9g}, the truth is "
            f"{float(truth.flatten()[at]):.9g}, off by {float(ratio[at]):.3g} × what rounding allows"
        )
        raise AssertionError(msg)
    return float(ratio[at])


def epsilon(*dtypes: torch.dtype | None) -> float:
    """Spacing of the coarsest dtype."""
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)


def smallest(dtype: torch.dtype) -> float:
    """How far a number may be off by underflow.

    Hardware flushes float32 below its least normal number, but keeps float16's subnormal ones. In float64 it is the
    squares of the budget itself that underflow, far above the least number.
    """
    info = torch.finfo(dtype)
    if dtype == torch.float64:
        return math.sqrt(info.tiny)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


class Forward(NamedTuple):
    """What the two budgets of attention share, in float64 and grouped by key head."""

    q: Tensor  # [b, g, r, m, d]
    k: Tensor  # [b, g, n, d], dead slots zeroed
    v: Tensor  # [b, g, n, e], dead slots zeroed
    out: Tensor  # [b, g, r, m, e]
    lse: Tensor  # [b, g, r, m]
    p: Tensor  # [b, g, r, m, n], the weights
    slope: Tensor  # [b, g, r, m, n], derivative of a score by q · k
    slope_off: Tensor  # [b, g, r, m, n], error of that derivative: 1 - tanh² cancels where the cap bites
    shown: Tensor  # [b, g, r, m, n], 1.0 where the query sees the key
    u: Tensor  # [b, g, r, m], relative error of a weight
    lse_off: Tensor  # [b, g, r, m], error of the log-sum-exp, which all weights of a row share
    eps: float
    fine: float
    tiny: float
    out_tiny: float  # how far an element of out may be off by underflow


def attention_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    d_out: Tensor | None = None,
    d_lse: Tensor | None = None,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
) -> dict[str, Bound]:
    """Bound ``out`` and ``lse``, and with a cotangent ``d_out`` also ``dq``, ``dk``, ``dv`` and ``dsink``.

    Arguments are those of `longspan.spec.attention`, in the dtype under test.
    """
    eps, fine = epsilon(q.dtype, out_dtype), 8 * torch.finfo(floating(q)).eps
    if q.dtype == torch.float64:
        eps, fine = 2 * eps, 2 * fine  # the truth is rounded like what it judges
    (b, _, m, d), (_, g, n, _) = q.shape, k.shape
    factor = 1 / math.sqrt(d) if scale is None else scale
    seen = bounds(mask, b, m, n, q_offset=q_offset, k_offset=k_offset, device=q.device)
    see = visible(seen, n)
    q64 = q.detach().double()
    k64, v64 = (x.detach().double().masked_fill(rearrange(~see.any(1), "b n -> b 1 n 1"), 0.0) for x in (k, v))
    sink64, slopes = (None if x is None else x.detach().double() for x in (sink, alibi))
    truth = attention(
        q64, k64, v64, mask=mask, scale=scale, softcap=softcap, sink=sink64, alibi=slopes,
        q_offset=q_offset, k_offset=k_offset,
    )  # fmt: skip

    capped = scores(q64, k64, scale=scale, softcap=softcap)
    size = scores(q64.abs(), k64.abs(), scale=abs(factor), softcap=None) + (softcap or 0.0)
    distance = torch.zeros_like(capped) if slopes is None else penalty(slopes, seen, k64)
    hidden = rearrange(~see, "b m n -> b 1 1 m n")
    lse = grouped(truth.lse, g)
    largest = (size + distance.abs()).masked_fill(hidden, 0.0).amax(-1) if n else torch.zeros_like(lse)
    if sink64 is not None:
        largest = torch.maximum(largest, rearrange(sink64.abs(), "(g r) -> g r 1", g=g))
    lse_off = fine * (largest + lse.nan_to_num(neginf=0.0).abs() + 1)
    seen_by = Forward(
        q=grouped(q64, g), k=k64, v=v64, out=grouped(truth.out, g), lse=lse,
        p=weights((capped - distance).masked_fill(hidden, -torch.inf), lse),
        slope=factor * (torch.ones_like(capped) if softcap is None else 1 - (capped / softcap) ** 2),
        slope_off=abs(factor) * (0.0 * capped if softcap is None else 2 * fine * (size + softcap) / softcap),
        shown=(~hidden).double().expand_as(capped), u=eps + lse_off, lse_off=lse_off,
        eps=eps, fine=fine, tiny=smallest(q.dtype), out_tiny=smallest(out_dtype or q.dtype),
    )  # fmt: skip
    off = root(seen_by.u, seen_by.p, v64, "b g r m n, b g n e -> b g r m e") + column(seen_by.u) * seen_by.out.abs()
    lost = seen_by.tiny * einsum(seen_by.shown, v64**2, "b g r m n, b g n e -> b g r m e").sqrt()
    lost = lost + seen_by.out_tiny
    result = {"out": Bound(truth.out, 2 * flat(off + lost)), "lse": Bound(truth.lse, 2 * flat(lse_off))}
    if d_out is None:
        return result
    d_lse = torch.zeros_like(truth.lse) if d_lse is None else d_lse
    # A cotangent that is finer than the inputs is rounded to their dtype, to be multiplied with them.
    rough = epsilon(q.dtype) if epsilon(d_out.dtype) < epsilon(q.dtype) else 0.0
    return result | gradient_bounds(
        seen_by, grouped(d_out.detach().double(), g), grouped(d_lse.detach().double(), g), sink, rough
    )


def gradient_bounds(of: Forward, d_out: Tensor, d_lse: Tensor, sink: Tensor | None, rough: float) -> dict[str, Bound]:
    """Bound the gradients: ``dS = P ∘ (dP - delta)``, delta = rowsum(dO ∘ O) - dLSE (FlashAttention-2, Algorithm 2)."""
    product = of.out * d_out
    delta = product.sum(-1) - d_lse
    p_slope = of.p * of.slope
    gap = einsum(d_out, of.v, "b g r m e, b g n e -> b g r m n") - column(delta)
    d_capped = of.p * gap
    # Delta is off by the rounding of O, by its own sum, by the weights that made O, and by underflow of O.
    delta_off = of.eps * (product**2).sum(-1).sqrt() + of.fine * (product.abs().sum(-1) + d_lse.abs())
    delta_off = delta_off + of.u * (d_capped**2).sum(-1).sqrt() + of.lse_off * product.sum(-1).abs()
    delta_off = delta_off + of.out_tiny * (d_out**2).sum(-1).sqrt()
    d_score = d_capped * of.slope
    reach = einsum(d_out.abs(), of.v.abs(), "b g r m e, b g n e -> b g r m n")
    d_score_off = column(of.u) * d_score.abs() + d_capped.abs() * of.slope_off + of.fine * p_slope.abs() * reach
    # A weight below float32's least number is flushed, whatever its gap would have made of it.
    d_score_off = d_score_off + smallest(torch.float32) * of.shown * (gap * of.slope).abs()
    one = torch.ones_like(of.u)
    d_score_off = d_score_off + rough * p_slope.abs() * root(one, d_out, of.v, "b g r m e, b g n e -> b g r m n")

    to_q, to_k = "b g r m n, b g n d -> b g r m d", "b g r m n, b g r m d -> b g n d"
    dq = einsum(d_score, of.k, to_q)
    drift = einsum(p_slope, of.k, to_q).abs() + of.eps * einsum(p_slope.abs(), of.k.abs(), to_q)
    dq_off = root(one, d_score_off, of.k, to_q) + column(delta_off) * drift + of.eps * dq.abs()
    dk = einsum(d_score, of.q, to_k)
    dk_off = root(one, d_score_off, of.q, to_k) + root(delta_off, p_slope, of.q, to_k) + of.eps * dk.abs()
    dv = einsum(of.p, d_out, to_k)
    dv_off = root(of.u, of.p, d_out, to_k) + of.eps * dv.abs()
    unit = of.shown * max(1.0, float(of.slope.abs().max())) if of.slope.numel() else of.shown  # scaled late or early
    result = {
        "dq": Bound(flat(dq), 2 * flat(dq_off + of.tiny * (1 + root(one, unit, of.k, to_q)))),
        "dk": Bound(dk, 2 * (dk_off + of.tiny * (1 + root(one, unit, of.q, to_k)))),
        "dv": Bound(dv, 2 * (dv_off + of.tiny * (1 + root(one, of.shown, d_out, to_k)))),
    }
    if sink is not None:
        share = (rearrange(sink.detach().double(), "(g r) -> g r 1", g=of.k.shape[1]) - of.lse).exp()
        flow = -share * delta
        off = ((of.u * flow) ** 2 + (share * delta_off) ** 2).sum((0, 3)).sqrt() + of.fine * flow.abs().sum((0, 3))
        flow = rearrange(flow.sum((0, 3)), "g r -> (g r)")
        result["dsink"] = Bound(flow, 2 * (rearrange(off, "g r -> (g r)") + epsilon(sink.dtype) * flow.abs() + of.tiny))
    return result


def root(row: Tensor, p: Tensor, x: Tensor, pattern: str) -> Tensor:
    """Root sum of squares of ``row · p · x``: how independent roundings add."""
    return einsum((column(row) * p) ** 2, x**2, pattern).sqrt()


def column(row: Tensor) -> Tensor:
    """Broadcast a number per row over its keys."""
    return rearrange(row, "... -> ... 1")


def grouped(x: Tensor, g: int) -> Tensor:
    """Split query heads into the groups that share a key head."""
    return rearrange(x, "b (g r) ... -> b g r ...", g=g)


def flat(x: Tensor) -> Tensor:
    """Lay grouped heads out as the query heads they are."""
    return rearrange(x, "b g r ... -> b (g r) ...")


def rotate_bound(truth: Tensor, x: Tensor, position: Tensor, rotation: Rotation, partner: Tensor) -> Bound:
    """Bound a rotation: rounding of the result, and angle and sine against the length of each plane.

    ``partner`` holds, at every coordinate, the other coordinate of its plane (0 where the coordinate does not turn).
    """
    eps, fine = epsilon(x.dtype), 4 * torch.finfo(floating(x)).eps
    off = (
        ANGLE
        if x.dtype != torch.float64
        else float(fine * (1 + angle(position, rotation).abs().max()))
        if position.numel()
        else 0.0
    )
    factor = rotation.attention_factor
    factor = rearrange(factor.abs(), "... -> ... 1 1 1") if isinstance(factor, Tensor) else abs(factor)
    length = factor * (x.double() ** 2 + partner.double() ** 2).sqrt()
    still = partner.isnan()  # a coordinate of the tail is copied, bit for bit
    length = length.masked_fill(still, 0.0)
    budget = (eps * truth.abs() + smallest(x.dtype)).masked_fill(still, 0.0) + (off + fine) * length
    return Bound(truth, 2 * budget)
