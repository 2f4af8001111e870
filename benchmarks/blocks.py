"""Which blocks of scores a causal mask shows, as FlexAttention wants to be told."""

from typing import Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK: Final = 128  # tokens


def blocks(m: int, n: int, window: int | None, device: torch.device) -> BlockMask:
    """Say which blocks a causal mask shows in part and which whole: by formula, and not from all m × n pairs."""

    def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) if window is None else (j <= i) & (i - j < window)

    first_i, first_j = torch.arange(0, m, BLOCK, device=device)[:, None], torch.arange(0, n, BLOCK, device=device)
    last_i, last_j = first_i + BLOCK - 1, first_j + BLOCK - 1
    size = m + n if window is None else window
    some = (first_j <= last_i) & (first_i - last_j < size)
    whole = (last_j <= first_i) & (last_i - first_j < size) & (last_i < m)

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of each row, and which: those first, in order."""
        which = which.to(torch.int32)[None, None]
        return which.sum(-1, dtype=torch.int32), which.argsort(stable=True, dim=-1, descending=True).to(torch.int32)

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(m, n)
    )
