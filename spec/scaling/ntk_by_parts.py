"""NTK-by-parts interpolation (Peng et al. 2023, arXiv:2309.00071, Definition 2).

Planes that turn many times over the trained context tell neighbours apart and keep their speed;
planes that never finish a turn tell absolute position and are interpolated in full.
"""

import torch

from ..checks import check_planes
from ..ramp import blend, check_ramp, ramp, turns_over
from ..rope import Rotation, inv_freq


def ntk_by_parts(
    d: int,
    *,
    base: float = 10_000.0,
    factor: float,
    original: int,
    alpha: float = 1.0,
    beta: float = 32.0,
    device: torch.device | str | None = None,
) -> Rotation:
    """Blend trained and interpolated speed by a ramp over the number of turns.

    Args:
        d: Rotated coordinates of a head.
        base: RoPE base θ.
        factor: How many times longer than trained the context becomes.
        original: Trained context length, in tokens.
        alpha: Planes with fewer turns than this over the trained context are interpolated in full.
        beta: Planes with more turns than this keep their speed (1 and 32 are the paper's choice for Llama).
        device: Where the rotation lives.
    """
    check_planes("ntk_by_parts", d, base=base, factor=factor, original=original, alpha=alpha, beta=beta)
    check_ramp("ntk_by_parts", alpha=alpha, beta=beta)
    trained = inv_freq(d, base=base, device=device)
    return Rotation(blend(trained, factor, ramp(turns_over(trained, original), alpha, beta)))
