"""Which queries see a tile of keys: a search in the bounds of the rows, on their own device.

Shapes: b batch, m queries, t tiles of keys.
"""

import torch
from torch import Tensor


def sight(rows: Tensor, keep: int, n: int, size: int) -> Tensor:
    """Find, for every tile of ``size`` keys, the rows that may see some of it.

    Exact where first and last are nondecreasing along the rows, as they are for every mask but `spans`; for any
    other rows still a range that misses none.

    Args:
        rows: int32 [4, b, m]: first, last, base and position of every row.
        keep: Keys at base that stay visible.
        n: Keys.
        size: Keys of a tile.

    Returns:
        int32 [b, t, 6], half-open ranges of rows: those whose interval meets the tile, those whose interval holds
        all of it, and those whose head meets it.
    """
    first, last, base = (x.contiguous() for x in rows[:3])
    b, m = first.shape
    starts = torch.arange(0, n, size, dtype=torch.int32, device=rows.device).expand(b, -1).contiguous()
    stops = starts + size
    # The largest so far and the least from here on are monotone whatever the rows are.
    first_far, last_far = (x.cummax(1).values if m else x for x in (first, last))
    first_near, last_near = (x.flip(1).cummin(1).values.flip(1).contiguous() if m else x for x in (first, last))
    sees = torch.searchsorted(last_far, starts, right=True), torch.searchsorted(first_near, stops)
    holds = torch.searchsorted(last_near, stops), torch.searchsorted(first_far, starts, right=True)
    heads = sees
    if keep and m:
        base_far, base_near = base.cummax(1).values, base.flip(1).cummin(1).values.flip(1).contiguous()
        # The head ends at base + keep or at last, whichever is less.
        end = torch.maximum(torch.searchsorted(base_far + keep, starts, right=True), sees[0])
        heads = end, torch.searchsorted(base_near, stops)
    return torch.stack([*sees, *holds, *heads], dim=-1).to(torch.int32)
