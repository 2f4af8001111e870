"""No scaling: the rotation a model was trained with (Su et al. 2021, arXiv:2104.09864)."""

import torch

from ..rope import Rotation, inv_freq
from ..checks import check_planes


def none(d: int, *, base: float = 10_000.0, device: torch.device | str | None = None) -> Rotation:
    """Turn ``d`` coordinates at ``base^(-2p / d)`` radians per token."""
    check_planes("none", d, base=base)
    return Rotation(inv_freq(d, base=base, device=device))
