"""Calls that differ in their sizes alone: a cache that grows by one key, a prompt of another length.

What is compiled, and how it is tiled, hangs on little of a size: whether 16 divides a stride, whether a tile is cut,
into how many parts the keys go. By that little (`form`) launches are kept, and taken to the sizes at hand by putting
other integers in.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from .decode_choices import LEAST
from .kin import LONGEST, NEAR, Sizes, kinds
from .launch import Again
from .reach import FARTHEST, Each, Given, Reach, any_sees
from .rows import Rows


class Launch(NamedTuple):
    """How a problem is launched: what its mask takes beside integers is lowered first.

    Attributes:
        again: The launch.
        lowered: How sequences or rows are made of the tensors of the mask; None where integers are all.
        seen: Whether every key is seen by some query, if that is known from integers; see `reach.any_sees`.
    """

    again: Again
    lowered: Each | Rows | None
    seen: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, alibi: Tensor | None, given: Given,
        offsets: Tensor | int | None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Launch on these tensors; None if they want other code."""
        if self.lowered is None:
            return self.again(q, k, v, sink, alibi)
        bounds = self.lowered(given, offsets)
        return None if bounds is None else self.again(q, k, v, sink, alibi, *bounds)

    def resized(
        self, sizes: Sizes, interval: tuple[int, ...], sees: Reach, q: Tensor, k: Tensor, v: Tensor,
        given: Given, offsets: Tensor | int | None,
    ) -> "Launch":  # fmt: skip
        """Take the code to a problem of the same form."""
        lowered = self.lowered and self.lowered.resized(sees, sizes.m, sizes.n, given, offsets, sizes.k_offset)
        return Launch(self.again.resized(sizes, interval, q, k, v), lowered, any_sees(*sizes[:2], *interval))

    def longer(self, before: Sizes, sizes: Sizes, interval: tuple[int, int, int, int, int]) -> "Launch | None":
        """Take the code to as many queries of more keys, by the keys alone; None if it needs a look at the form.

        What is `few` before keys are added is `few` after, and the number of parts hangs on how often `LEAST` fits.
        """
        m, n, last = sizes.m, sizes.n, before.n
        if m != before.m or sizes[3:] != before[3:] or sizes.values != n or not 1 < last < n <= LONGEST:
            return None
        if self.lowered is not None or -(-n // LEAST) != -(-last // LEAST) or any_sees(m, n, *interval) != self.seen:
            return None
        again = self.again.longer(n, interval)
        return None if again is None else Launch(again, None, self.seen)


def form(tiles: Hashable, b: int, sizes: Sizes, interval: tuple[int, int, int, int, int], lowered: bool) -> Hashable:
    """All that code, tiles and the number of parts depend on, of a call's sizes; None of what must be looked at anew.

    Of tensors whose addresses are aligned: others are launched by no plan. Whoever asks says it of ``tiles`` and parts,
    and whether anything is ``lowered`` beside integers.
    """
    m, n, values, of_q, of_k, of_v, q_offset, k_offset = sizes
    if n != values or not 0 < m <= LONGEST or not 0 < n <= LONGEST or b * m >= 2**31:
        return None
    if not 0 <= k_offset < FARTHEST or abs((q_offset or 0) - k_offset) + m > LONGEST:
        return None
    if of_q[2] >= NEAR or of_k[2] >= NEAR or of_v[2] >= NEAR:
        return None
    return (
        tiles,
        lowered or not any_sees(m, n, *interval),
        lowered and q_offset is None,  # where the kernel that lowers finds the queries
        kinds(of_q, of_k, of_v),
        (m == 1, n == 1),  # of such an axis, descriptors do not ask for the stride
    )
