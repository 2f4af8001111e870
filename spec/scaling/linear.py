"""Position Interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 4)."""

import torch

from ..checks import check_planes
from ..rope import Rotation, inv_freq


def linear(d: int, *, base: float = 10_000.0, factor: float, device: torch.device | str | None = None) -> Rotation:
    """Read position m as m / factor: every plane turns ``factor`` times slower."""
    check_planes("linear", d, base=base, factor=factor)
    return Rotation(inv_freq(d, base=base, device=device) / factor)
