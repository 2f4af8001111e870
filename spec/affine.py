"""Masks whose rows all see the same interval, moved by one key a row: what a kernel applies with no load per row.

Row i sees ``max(i + low, 0) <= j < min(i + high, stop)``, where i counts the queries and j the keys given.
Equal to `bounds` wherever it is not None. Shapes: b batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from .masks import Causal, Lengths, Mask, Window, check_mask


class Affine(NamedTuple):
    """A mask as four numbers, or four numbers a sequence; query i stands at key ``i + position``."""

    low: int | Int64[Tensor, " b"]
    high: int | Int64[Tensor, " b"]
    stop: int | Int64[Tensor, " b"]
    position: int | Int64[Tensor, " b"]


def affine(
    mask: Mask,
    m: int,
    n: int,
    *,
    q_offset: int | Int[Tensor, " b"] | None = None,
    k_offset: int = 0,
    device: torch.device | str | None = None,
) -> Affine | None:
    """Lower a mask to one interval that moves with the row, or None if it is not of that form.

    Every number but the position is between -m and n, which loses nothing: row i + n sees no key, row i - m no
    key before the first.

    Args:
        mask: The terms.
        m: Queries.
        n: Keys given.
        q_offset: Position of the first query; by default the queries are the last of the keys.
        k_offset: Position of the first key given.
        device: Where lengths are taken to.
    """
    check_mask(mask)
    low: list[int] = []
    high: list[int] = []
    end: int | Tensor = k_offset + n
    for term in mask.terms:
        match term:
            case Causal():
                high.append(1)
            case Window(size, ahead, 0):
                low.append(1 - size)
                high.append(ahead + 1)
            case Lengths(lengths):
                end = lengths.to(device, torch.int64)
            case _:
                return None
    offset = q_offset.to(torch.int64) if isinstance(q_offset, Tensor) else q_offset
    position = (end - m if offset is None else offset) - k_offset
    return Affine(
        low=-m if not low else within(position + max(low), -m, n),
        high=n if not high else within(position + min(high), -m, n),
        stop=within(end - k_offset, 0, n),
        position=position,
    )


def within(x: int | Int64[Tensor, " b"], least: int, most: int) -> int | Int64[Tensor, " b"]:
    """Clamp a number, or every number of a tensor."""
    return x.clamp(least, most) if isinstance(x, Tensor) else min(max(x, least), most)
