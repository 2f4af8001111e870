"""Dynamic NTK scaling (emozilla 2023; Peng et al. 2023, arXiv:2309.00071, "Dynamic Scaling").

The stretch follows the length of the sequence, so that nothing changes up to the trained length.
The length is an argument: keys that were cached under another length must be turned again
(`longspan.spec.rerotate`) or cached unrotated, as that section says.
Shapes: b sequences.
"""

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from ..checks import check_planes, refuse, same_device
from ..ramp import spread
from ..rope import Rotation, inv_freq


def dynamic_ntk(
    d: int,
    *,
    base: float = 10_000.0,
    factor: float,
    original: int,
    length: int | Int[Tensor, " b"],
    device: torch.device | str | None = None,
) -> Rotation:
    """NTK by ``factor · length / original - (factor - 1)``, and nothing up to ``original``.

    Args:
        d: Rotated coordinates of a head, at least 4.
        base: RoPE base θ.
        factor: Slope of the stretch; 1 stretches by exactly ``length / original``.
        original: Trained context length, in tokens.
        length: Tokens of the sequence, or of each sequence of a batch; then `inv_freq` is [b, p].
        device: Where the rotation lives.
    """
    check_planes("dynamic_ntk", d, base=base, factor=factor, original=original)
    if d < 4:
        refuse("dynamic_ntk: d, the number of rotated coordinates,", "at least 4", d)
    trained = inv_freq(d, base=base, device=device)
    if isinstance(length, Tensor):
        same_device(length=length, inv_freq=trained)
        beyond = (length.to(torch.float64) / original).clamp(min=1)
        return Rotation(spread(trained, rearrange(factor * beyond - (factor - 1), "b -> b 1")))
    if length < 0:
        refuse("dynamic_ntk: length", "at least 0", length)
    return Rotation(spread(trained, factor * max(length / original, 1.0) - (factor - 1)))
