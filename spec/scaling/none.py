"""No scaling: the rotation a model was trained with (Su et al. 2021, arXiv:2104.09864).

A larger base on its own ("ABF": CodeLlama, Llama 3, Qwen) is this method with another `base`.
"""

import torch

from ..checks import check_planes
from ..rope import Rotation, inv_freq


def none(d: int, *, base: float = 10_000.0, device: torch.device | str | None = None) -> Rotation:
    """Turn ``d`` coordinates at ``base^(-2p / d)`` radians per token."""
    check_planes("none", d, base=base)
    return Rotation(inv_freq(d, base=base, device=device))
