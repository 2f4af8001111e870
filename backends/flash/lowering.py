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
from longspan.spec.masks import Mask

from .reach import FARTHEST, Given, Lowered, Reach, reach, sequences_of, told
from .rope_function import watched
from .rope_kernel import on
from .rows import CHUNKS, lower_rows


def lower(
    mask: Mask, b: int, m: int, n: int, *, q_offset: int | Tensor | None, k_offset: int, device: torch.device
) -> Lowered:
    """Lower a mask to the cheaper form that holds it; whoever asks has seen that it was made for this problem."""
    terms = told(mask)
    if terms is not None and not watched():
        sees, given = reach(terms[0]), terms[1]
        lowered = lowered_there(sees, given, b, m, n, q_offset, k_offset, device)
        if lowered is not None:
            return lowered
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


def lowered_there(
    sees: Reach, given: Given, b: int, m: int, n: int, q_offset: int | Tensor | None, k_offset: int,
    device: torch.device,
) -> Lowered | None:  # fmt: skip
    """Lower by a kernel what takes more than integers; None where somebody watches operations, or it takes no more."""
    tensors = [x for x in (*given, q_offset) if isinstance(x, Tensor)]
    if len(sees.chunks) > CHUNKS or watched(*tensors):
        return None
    if sees.moves and given.q_lengths is None:
        if not tensors or any(x.device != device for x in tensors):
            return None
        with on(device):
            sequences, again = sequences_of(sees, b, m, n, given.lengths, q_offset, k_offset)
        return Lowered(None, sequences, -m, n, n, 0, 0, again)
    rows = torch.empty((4, b, m), dtype=torch.int32, device=device)
    if watched(rows):
        return None
    with on(device):
        again = lower_rows(sees, rows, n, given, q_offset, k_offset)
    return Lowered(rows, None, -m, n, n, 0, min(sees.keep, FARTHEST), again)


def clamped(x: Any) -> Any:
    """Give kernels a number that they can hold; one that stands for any length stays one, and is not looked at."""
    x = x if isinstance(x, int | torch.SymInt) else int(x)
    return min(max(x, -FARTHEST), FARTHEST)
