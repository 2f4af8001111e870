"""YaRN as the paper defines it (Peng et al. 2023, arXiv:2309.00071, Definition 3).

NTK-by-parts and a temperature. Its ramp is linear in the number of turns, whereas the ramp of
the published checkpoints is linear in the plane index: those are `yarn`.
"""

import torch

from ..checks import check_planes
from ..ramp import blend, check_ramp, ramp, temperature, turns_over
from ..rope import Rotation, inv_freq


def yarn_paper(
    d: int,
    *,
    base: float = 10_000.0,
    factor: float,
    original: int,
    alpha: float = 1.0,
    beta: float = 32.0,
    device: torch.device | str | None = None,
) -> Rotation:
    """Blend by a ramp over the number of turns, and sharpen the softmax by ``0.1 · ln(factor) + 1``.

    Args:
        d: Rotated coordinates of a head.
        base: RoPE base θ.
        factor: How many times longer than trained the context becomes.
        original: Trained context length, in tokens.
        alpha: Planes with fewer turns than this over the trained context are interpolated in full.
        beta: Planes with more turns than this keep their speed.
        device: Where the rotation lives.
    """
    check_planes("yarn_paper", d, base=base, factor=factor, original=original, alpha=alpha, beta=beta)
    check_ramp("yarn_paper", alpha=alpha, beta=beta)
    trained = inv_freq(d, base=base, device=device)
    return Rotation(
        blend(trained, factor, ramp(turns_over(trained, original), alpha, beta)),
        attention_factor=temperature(factor),
    )
