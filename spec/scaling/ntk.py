"""NTK-aware interpolation (bloc97 2023; Peng et al. 2023, arXiv:2309.00071, Definition 1).

Position Interpolation blurs the fast planes, by which a model tells neighbours apart. Here the
stretching is spread over the planes: the fastest keeps its speed, the slowest gives way in full.
"""

import torch

from ..checks import check_planes, refuse
from ..ramp import spread
from ..rope import Rotation, inv_freq


def ntk(d: int, *, base: float = 10_000.0, factor: float, device: torch.device | str | None = None) -> Rotation:
    """Replace the base by ``base · factor^(d / (d - 2))``.

    Args:
        d: Rotated coordinates of a head, at least 4: the first plane and the last must differ.
        base: RoPE base θ.
        factor: How many times slower the last plane turns ("alpha" in several libraries).
        device: Where the rotation lives.
    """
    check_planes("ntk", d, base=base, factor=factor)
    if d < 4:
        refuse("ntk: d, the number of rotated coordinates,", "at least 4", d)
    return Rotation(spread(inv_freq(d, base=base, device=device), factor))
