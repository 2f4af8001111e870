"""Llama 3.1's scaling (Meta 2024, `apply_scaling` of meta-llama/llama-models).

It is NTK-by-parts with the ramp from 1 to 4 turns instead of 1 to 32, and has no temperature.
"""

import torch

from ..checks import check_planes, refuse
from ..ramp import blend, ramp, turns_over
from ..rope import Rotation, inv_freq


def llama3(
    d: int,
    *,
    base: float = 500_000.0,
    factor: float,
    original: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    device: torch.device | str | None = None,
) -> Rotation:
    """Keep planes of many turns, slow planes of few down by ``factor``, blend in between.

    Args:
        d: Rotated coordinates of a head.
        base: RoPE base θ.
        factor: How many times slower the slow planes turn.
        original: Trained context length, in tokens.
        low_freq_factor: Planes with fewer turns than this over the trained context are slowed down in full.
        high_freq_factor: Planes with more turns than this keep their speed; equal to `low_freq_factor`
            (Llama 4 Scout), there is no blend.
        device: Where the rotation lives.
    """
    check_planes("llama3", d, base=base, factor=factor, original=original,
                 low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor)  # fmt: skip
    if low_freq_factor > high_freq_factor:
        refuse("llama3: low_freq_factor", f"at most high_freq_factor, {high_freq_factor}", low_freq_factor)
    trained = inv_freq(d, base=base, device=device)
    return Rotation(blend(trained, factor, ramp(turns_over(trained, original), low_freq_factor, high_freq_factor)))
