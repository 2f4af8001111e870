"""YaRN as the published checkpoints define it (Peng et al. 2023, arXiv:2309.00071, and jquesnelle/yarn).

The paper blends interpolated and trained frequencies by a ramp that is linear in the number of
turns over the trained context (`yarn_paper`); its code, and so every checkpoint, by a ramp that is
linear in the plane index between the planes that turn ``beta_fast`` and ``beta_slow`` times.
"""

import math

import torch

from ..checks import check_planes, refuse
from ..ramp import blend, check_ramp, ramp, temperature
from ..rope import Rotation, inv_freq


def yarn(
    d: int,
    *,
    base: float = 10_000.0,
    factor: float,
    original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    softmax_mscale: float | None = None,
    device: torch.device | str | None = None,
) -> Rotation:
    """Leave fast planes alone, interpolate slow ones, ramp over the plane index in between.

    Args:
        d: Rotated coordinates of a head.
        base: RoPE base θ, above 1.
        factor: How many times longer than trained the context becomes.
        original: Trained context length, in tokens.
        beta_fast: Planes that turn more often than this over the trained context keep their speed.
        beta_slow: Planes that turn less often than this are interpolated in full.
        truncate: Round the ramp's ends outward to whole planes (a published config key; gpt-oss says false).
        attention_factor: Overrides the temperature below.
        mscale: With `mscale_all_dim`, the temperature is temperature(mscale) / temperature(mscale_all_dim).
        mscale_all_dim: See `mscale`.
        softmax_mscale: Additionally multiply the softmax scale by temperature(softmax_mscale)² (DeepSeek).
        device: Where the rotation lives.

    >>> made = yarn(8, base=100.0, factor=4.0, original=64)
    >>> inv_freq(8, base=100.0) / made.inv_freq  # the fastest plane keeps its speed, the slowest is interpolated
    tensor([1.0000, 1.3333, 2.0000, 4.0000], dtype=torch.float64)
    >>> round(made.attention_factor, 4)  # 0.1 ln 4 + 1
    1.1386
    """
    check_planes("yarn", d, base=base, factor=factor, original=original, beta_fast=beta_fast, beta_slow=beta_slow)
    check_ramp("yarn", beta_slow=beta_slow, beta_fast=beta_fast)
    if base <= 1:
        refuse("yarn: base", "above 1, for some planes to be slower than others", base)
    trained = inv_freq(d, base=base, device=device)
    low, high = (plane_that_turns(beta, d, base, original) for beta in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # d - 1 although there are d / 2 planes: so the first code had it, and so the checkpoints were trained.
    low, high = max(low, 0), min(high, d - 1)
    plane = torch.arange(d // 2, dtype=torch.float64, device=device)
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = temperature(factor, mscale) / temperature(factor, mscale_all_dim)
    if attention_factor is not None and not math.isfinite(attention_factor):
        refuse("yarn: attention_factor", "finite", attention_factor)
    return Rotation(
        blend(trained, factor, 1 - ramp(plane, low, high if high != low else low + 0.001)),
        attention_factor=temperature(factor) if attention_factor is None else attention_factor,
        softmax_factor=1.0 if softmax_mscale is None else temperature(factor, softmax_mscale) ** 2,
    )


def plane_that_turns(turns: float, d: int, base: float, original: int) -> float:
    """Fractional index of the plane that makes ``turns`` turns over the trained context."""
    return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
