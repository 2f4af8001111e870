"""A mask as the kernels read it: five integers, and at most two small int32 tensors.

Two forms. Affine: row i sees ``max(i + low, 0) <= j < min(i + high, stop)``, from four integers or, where lengths
or offsets differ, from four a sequence; nothing is loaded per row. Rows: ``first <= j < last`` or
``base <= j < min(base + keep, last)``, with first, last and base of every row in memory.
Shapes: b batch, m queries, n keys.
"""

from typing import Any

import torch
from torch import Tensor

from longspan.spec import bounds
from longspan.spec.affine import affine
from longspan.spec.bounds import check_fit
from longspan.spec.masks import Mask

from .reach import FARTHEST, Lowered, reach, sequences_of, told
from .rope_function import watched
from .rope_kernel import on


def lower(
    mask: Mask, b: int, m: int, n: int, *, q_offset: int | Tensor | None, k_offset: int, device: torch.device
) -> Lowered:
    """Lower a mask to the cheaper form that holds it; ValueError for one that was made for another problem."""
    check_fit(mask, b, m, q_offset)
    terms = told(mask)
    lengths = None if terms is None else terms[1]
    tensors = [x for x in (lengths, q_offset) if isinstance(x, Tensor)]
    if terms is not None and tensors and lowered_there(device, *tensors):
        with on(device):
            sequences, each = sequences_of(reach(terms[0]), b, m, n, lengths, q_offset, k_offset)
        return Lowered(None, sequences, -m, n, n, 0, 0, each)
    moving = affine(mask, m, n, q_offset=q_offset, k_offset=k_offset, device=device)
    if moving is None:
        seen = bounds(mask, b, m, n, q_offset=q_offset, k_offset=k_offset, device=device)
        rows = torch.stack([seen.first, seen.last, seen.base, seen.position]).clamp(-FARTHEST, FARTHEST)
        return Lowered(rows.to(device, torch.int32), None, -m, n, n, 0, min(seen.keep, FARTHEST))
    if any(isinstance(x, Tensor) for x in moving):
        each = [x if isinstance(x, Tensor) else torch.full((b,), x, device=device) for x in moving]
        sequences = torch.stack(each, dim=1).clamp(-FARTHEST, FARTHEST).to(torch.int32)
        return Lowered(None, sequences, -m, n, n, 0, 0)
    low, high, stop, position = map(clamped, moving)
    return Lowered(None, None, low, high, stop, position, 0)


def lowered_there(device: torch.device, *tensors: Tensor) -> bool:
    """Whether a kernel can read tensors where the mask is wanted: not where somebody watches operations."""
    return not watched(*tensors) and all(x.device == device for x in tensors)


def clamped(x: Any) -> Any:
    """Give kernels a number that they can hold; one that stands for any length stays one, and is not looked at."""
    x = x if isinstance(x, int | torch.SymInt) else int(x)
    return min(max(x, -FARTHEST), FARTHEST)
