"""Quantised values as the tensor cores read them: keys contiguous, in the order of a thread's registers.

The order is told in `fp8_kernel`. Shapes: b batch, g key heads, n keys, e value dimension.
"""

from typing import Final, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from longspan.spec import Quantised
from longspan.spec.quantise import E4M3

GROUP: Final = 16  # keys that change places among themselves, and bytes that the copy engine wants of strides


class Values(NamedTuple):
    """Quantised values, laid out.

    Attributes:
        values: e4m3 ``[b, g, e, n]``, n rounded up to whole groups; zeros behind the last key. Of every 16 keys, key
            8u + 2t + c lies at place 4t + 2u + c (t < 4; u, c < 2).
        scale: float32 ``[b, g, 1]``.
        n: Keys.
    """

    values: Tensor
    scale: Tensor
    n: int


def laid_out(v: Quantised) -> Values:
    """Lay quantised values out for the tensor cores."""
    n = v.values.shape[2]
    x = pad(v.values.view(torch.uint8), (0, 0, 0, -n % GROUP))  # few operators know e4m3
    x = rearrange(x, "b g (s u t c) e -> b g e (s t u c)", u=2, t=4, c=2)
    return Values(x.contiguous().view(E4M3), v.scale, n)


def natural(v: Values) -> Quantised:
    """Undo `laid_out`."""
    x = rearrange(v.values.view(torch.uint8), "b g e (s t u c) -> b g (s u t c) e", u=2, t=4, c=2)
    return Quantised(x[:, :, : v.n].contiguous().view(E4M3), v.scale)
