"""The launches of `quantise_kernel`; see `longspan.spec.quantise`.

Shapes: b batch, h heads, n tokens, d head dimension.
"""

import torch
import triton
from torch import Tensor

from longspan.spec.quantise import E4M3, LEAST

from .quantise_kernel import largest_kernel, quantise_kernel
from .values import GROUP


def quantised(x: Tensor, signs: Tensor | None = None, *, values: bool = False) -> tuple[Tensor, Tensor]:
    """Launch the two kernels: numbers, ``[b, h, n, d]`` or those of `Values`, and scales ``[b, h, 1]``."""
    b, h, n, d = x.shape
    whole = -(-n // GROUP) * GROUP if values else n
    shape = (b, h, d, whole) if values else (b, h, n, d)
    out = torch.empty(shape, dtype=E4M3, device=x.device)
    largest = torch.zeros(b, h, 1, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, torch.full_like(largest, LEAST)
    scale = torch.empty_like(largest)
    width = triton.next_power_of_2(max(d, 16))
    tall = 16384 // width
    grid, strides = (-(-whole // tall), b * h), x.stride()[:3]
    flags = {"TURNED": signs is not None, "T": tall, "D": width, "num_warps": 8}
    given = largest if signs is None else signs
    largest_kernel[grid](x, given, largest, n, d, h, *strides, **flags)
    quantise_kernel[grid](x, given, largest, out, scale, n, d, h, *strides, whole, VALUES=values, **flags)
    return out, scale
