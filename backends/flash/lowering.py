"""A mask as the kernels read it: five integers, and at most two small int32 tensors.

Two forms. Affine: row i sees ``max(i + low, 0) <= j < min(i + high, stop)``, from four integers or, where lengths
or offsets differ, from four a sequence; nothing is loaded per row. Rows: ``first <= j < last`` or
``base <= j < min(base + keep, last)``, with first, last and base of every row in memory.
Shapes: b batch, m queries, n keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.spec import bounds
from longspan.spec.affine import affine
from longspan.spec.bounds import check_fit
from longspan.spec.masks import Mask

FARTHEST = 2**30  # tokens: positions and their differences stay inside int32


class Lowered(NamedTuple):
    """A mask in one of the two forms: rows if ``rows`` is given, else affine.

    Attributes:
        rows: int32 [4, b, m]: first, last, base and position of every row.
        sequences: int32 [b, 4]: low, high, stop and position of every sequence; None if one serves all.
        low: Key at which row 0 starts to see, affine.
        high: Key before which row 0 stops to see, affine.
        stop: Keys that there are, affine.
        position: Where row 0 stands among the keys, affine.
        keep: Keys at ``base`` that stay visible, rows.
    """

    rows: Tensor | None
    sequences: Tensor | None
    low: int
    high: int
    stop: int
    position: int
    keep: int

    @property
    def interval(self) -> list[int]:
        """The integers, in the order in which kernels take them."""
        return [self.low, self.high, self.stop, self.position, self.keep]


def lower(
    mask: Mask, b: int, m: int, n: int, *, q_offset: int | Tensor | None, k_offset: int, device: torch.device
) -> Lowered:
    """Lower a mask to the cheaper form that holds it; ValueError for one that was made for another problem."""
    check_fit(mask, b, m, q_offset)
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


def clamped(x: Any) -> Any:
    """Give kernels a number that they can hold; one that stands for any length stays one, and is not looked at."""
    x = x if isinstance(x, int | torch.SymInt) else int(x)
    return min(max(x, -FARTHEST), FARTHEST)


def all_seen(lowered: Lowered, m: int, n: int) -> bool:
    """Say, from the integers alone, whether every key is seen by some query, so that none may hold NaN."""
    if lowered.rows is not None or lowered.sequences is not None:
        return False
    return m > 0 and lowered.low <= 0 and m - 1 + lowered.high >= n and lowered.stop >= n
