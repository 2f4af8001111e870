"""Proportional RoPE, "p-RoPE" (Barbero et al. 2024, arXiv:2410.06205, §6), as Gemma 4 publishes it.

The slowest planes do not turn at all, so that they carry content whatever the distance. Unlike
partial rotary, the planes that turn keep the speeds and the places that they have in the whole head.
"""

import torch

from ..checks import check_planes, refuse
from ..rope import Rotation, inv_freq


def proportional(
    d: int,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    factor: float = 1.0,
    device: torch.device | str | None = None,
) -> Rotation:
    """Turn the first ``fraction`` of the d / 2 planes at ``base^(-2p / d) / factor``, the others not at all.

    Args:
        d: Coordinates of a head, all of them: speeds are computed over the whole head.
        base: RoPE base θ.
        fraction: Part of the planes that turn, above 0 and at most 1, rounded down to whole planes in
            float64 as the published code does.
        factor: How many times slower they turn than trained.
        device: Where the rotation lives.
    """
    check_planes("proportional", d, base=base, factor=factor, fraction=fraction)
    if fraction > 1:
        refuse("proportional: fraction", "at most 1", fraction)
    plane = torch.arange(d // 2, device=device)
    return Rotation(torch.where(plane < int(fraction * d // 2), inv_freq(d, base=base, device=device) / factor, 0.0))
