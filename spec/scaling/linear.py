"""Position Interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 4)."""

import torch

from ..checks import check_planes
from ..rope import Rotation, inv_freq


def linear(d: int, *, base: float = 10_000.0, factor: float, device: torch.device | str | None = None) -> Rotation:
    """Read position m as m / factor: every plane turns ``factor`` times slower.

    >>> linear(4, base=10_000.0, factor=4.0).inv_freq  # two planes, which turned by 1 and by 1/100 radian a token
    tensor([0.2500, 0.0025], dtype=torch.float64)
    """
    check_planes("linear", d, base=base, factor=factor)
    return Rotation(inv_freq(d, base=base, device=device) / factor)
