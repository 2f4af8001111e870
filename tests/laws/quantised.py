"""How far correct arithmetic on quantised heads may be from the truth, `longspan.spec.attention_quantised`.

The truth is attention, in float64, to what the numbers stand for, so that quantising costs nothing here. A kernel
multiplies weights as e4m3, the largest of a row being 2^8: each is off by half a step, 2^-4 of itself or 2^-18 of the
largest, and these add as root sum of squares, as everywhere in `budget`. Two errors do not: the mean of many roundings
leans by a square of one, and tensor cores of sm_90 add eight-bit products with 13 bits after the largest summand and
drop the rest (DeepSeek-V3, arXiv:2412.19437, §3.3.2).
Shapes: b batch, g key heads, r query heads of each, m queries, n keys, d head and e value dimension.
"""

import math
from typing import Final

import torch
from einops import einsum, rearrange

from longspan.spec import Quantised, attention_quantised, dequantise
from longspan.spec.attention import scores
from longspan.spec.bounds import bounds, visible
from longspan.spec.masks import Mask, everything
from longspan.spec.state import weights

from .budget import Bound, column, epsilon, flat, grouped, root, smallest

HALF_STEP: Final = 2.0**-4  # of e4m3, of a number
LEAST_STEP: Final = 2.0**-18  # of e4m3, of the largest weight, under an offset of 2^8
DROPPED: Final = 2.0**-13  # of the largest summand, by a tensor core that adds eight-bit products
PRODUCTS: Final = 4  # times that, of Σ|q · k|, is a score off; the worst of 1,300 problems on an H200 was 2.7
TILE: Final = 128  # products that tensor cores add before float32 does


def quantised_bounds(
    q: Quantised,
    k: Quantised,
    v: Quantised,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    q_offset: int | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Bound]:
    """Bound ``out`` and ``lse`` of attention to quantised heads; arguments are those of the specification."""
    options = {"mask": mask, "scale": scale, "q_offset": q_offset, "k_offset": k_offset}
    truth = attention_quantised(q, k, v, **options, out_dtype=torch.float64)
    (b, _, m, d), (_, g, n, _) = q.values.shape, k.values.shape
    see = visible(bounds(mask, b, m, n, q_offset=q_offset, k_offset=k_offset, device=q.values.device), n)
    q64 = dequantise(q)
    k64, v64 = (dequantise(x).masked_fill(rearrange(~see.any(1), "b n -> b 1 n 1"), 0.0) for x in (k, v))
    hidden = rearrange(~see, "b m n -> b 1 1 m n")
    lse = grouped(truth.lse, g)
    p = weights(scores(q64, k64, scale=scale, softcap=None).masked_fill(hidden, -torch.inf), lse)
    size = scores(q64.abs(), k64.abs(), scale=1 / math.sqrt(d) if scale is None else abs(scale), softcap=None)
    largest = size.masked_fill(hidden, 0.0).amax(-1) if n else torch.zeros_like(lse)
    fine = 8 * torch.finfo(torch.float32).eps
    score_off = PRODUCTS * DROPPED * largest  # of a score, hence of a weight
    lse_off = score_off + fine * (largest + lse.nan_to_num(neginf=0.0).abs() + 1)
    least = LEAST_STEP * p.amax(-1) if n else torch.zeros_like(lse)

    to_out = "b g r m n, b g n e -> b g r m e"
    shown = (~hidden).double().expand_as(p)
    rounded = root(HALF_STEP + lse_off, p, v64, to_out) + root(least, shown, v64, to_out)
    reach = einsum(p, v64.abs(), to_out)
    leaning = (HALF_STEP**2 / 3 + DROPPED * min(n, TILE) / 32) * reach
    eps = epsilon(out_dtype)
    off = rounded + leaning + (column(lse_off) + eps) * grouped(truth.out, g).abs() + smallest(out_dtype)
    return {"out": Bound(truth.out, 2 * flat(off)), "lse": Bound(truth.lse, 2 * flat(lse_off))}
