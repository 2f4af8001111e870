# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""From a call on a paged cache to its kernels: the choice, the grid, the workspace, and how to do all that again.

Shapes: tokens of all sequences' queries together, b sequences, h query heads, g key heads, d head, e value dimension.
"""

from collections.abc import Hashable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from longspan.spec.masks import Causal, Chunks, Mask, Prefix, Window
from longspan.spec.paged import gather

from .decode import WIDEST, alike, merge_flags, pieces
from .decode_choices import LEAST_PAGED, MOST, PagedChoice, choose_paged, paged_key
from .fitting import fitting
from .kin import LONGEST, NEAR, kinds
from .launch import INTERPRETED, Call, describable, describe, padded, quiet
from .paged_kernel import paged_kernel, paged_merge_kernel
from .plan import Bound
from .reach import FARTHEST
from .rope_kernel import on

SEQUENCES: Final = 2**16  # every program holds the lengths of all


class Sight(NamedTuple):
    """A mask in the coordinates of each sequence: ``max(i + low, 0, …) <= j < min(i + high, length, …)``.

    Attributes:
        low: Where row 0 of a sequence starts to see.
        high: Key before which row 0 stops to see.
        prefix: Keys that every row sees, and causally after them; -1 is no such limit.
        keep: First keys that stay visible.
        chunks: Sizes of chunks outside whose own a row sees nothing.
    """

    low: int
    high: int
    prefix: int
    keep: int
    chunks: tuple[int, ...]

    @property
    def reach(self) -> int:
        """Keys that one row sees at most."""
        wide = min([self.high - self.low, *self.chunks]) if self.prefix < 0 else FARTHEST
        return min(wide + self.keep, FARTHEST)


def sight(mask: Mask) -> Sight:
    """Lower a mask of ragged sequences: of any term but documents, lengths and spans, which these bring or exclude."""
    low, high, prefix, keep, chunks = -FARTHEST, FARTHEST, -1, 0, []
    for term in mask.terms:
        match term:
            case Causal():
                high = min(high, 1)
            case Window(size, ahead, first):
                low, high, keep = max(low, 1 - size), min(high, ahead + 1), first
            case Prefix(length):
                prefix = min(length, FARTHEST)
            case Chunks(size):
                chunks.append(min(size, FARTHEST))
            case _:
                raise AssertionError(term)
    return Sight(max(low, -FARTHEST), high, prefix, min(keep, FARTHEST), tuple(chunks))


class Work(NamedTuple):
    """How a call is cut up.

    Attributes:
        seen: The mask.
        tile_m: See `PagedChoice`, as for the next three.
        tile_n: Keys of a tile.
        wanted: Programs per key head.
        least: Key tiles of a part.
        heads: Key heads.
        factors: See `Call`.
    """

    seen: Sight
    tile_m: int
    tile_n: int
    wanted: int
    least: int
    heads: int
    factors: tuple[float, float, float]

    def tiles(self, tokens: int, h: int, b: int) -> int:
        """Row tiles of a key head, at most."""
        group = h // self.heads
        tiles = -(-tokens * group // self.tile_m) + min(b + 1, tokens)
        return tiles if self.tile_m % group else min(tiles, tokens)  # where each has a query of its own

    @property
    def rows(self) -> int:
        """Rows of the workspace."""
        return 2 * self.wanted * self.heads * self.tile_m if self.wanted > 1 else 0

    def plan(self, h: int, capacity: int) -> tuple[int, int, int, int]:
        """What `paged_kernel.plan` takes."""
        reach = min(self.seen.reach + self.tile_m // (h // self.heads) + 2 * self.tile_n, FARTHEST)
        return reach, capacity, self.wanted, self.least

    def launches(
        self, q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor
    ) -> tuple[tuple[int], tuple[Any, ...], tuple[int], tuple[Any, ...]]:
        """Grid and numbers of both kernels: all that they take after addresses."""
        (tokens, h, d), e, b = q.shape, v_pages.shape[3], lengths.shape[0]
        seen, g, tiles = self.seen, self.heads, self.tiles(tokens, h, b)
        plan = self.plan(h, table.shape[1] * k_pages.shape[2])
        numbers = (
            *q.stride()[:2], q_lengths.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3], *table.stride(),
            lengths.stride(0), b, tokens, h, h // g, d, e, seen.low, seen.high, seen.prefix, seen.keep,
            *(*seen.chunks, FARTHEST, FARTHEST)[:2], *self.factors, *plan,
        )  # fmt: skip
        merging = (q_lengths.stride(0), lengths.stride(0), b, tokens, h, h // g, e, *plan)
        # With T row tiles, rounding up makes T - 1 parts more than wanted, at most. A program with nothing to do would
        # still start after the others, and keep the kernel that merges from being launched before they end.
        programs = (self.wanted + tiles - 1) * g
        return (programs,), numbers, (min(self.wanted, tiles) * g * self.tile_m,), merging


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the kernels on what the operator takes."""
    return run(*arguments)[:2]


@fitting
def run(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor,
    sink: Tensor | None, alibi: Tensor | None, sees: list[int], scale: float, softcap: float | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, "Repeated | None"]:  # fmt: skip
    """Launch the kernel and, where keys may have been split, the one that merges; say how to do it again.

    The workspace is at most ``2 · wanted · g · tile_m`` rows of parts, in float32, whatever the lengths are.
    """
    if INTERPRETED:
        gather(k_pages[..., :0], table, lengths)  # for its checks of values
    (tokens, h, d), (_, g, page, e), b = q.shape, v_pages.shape, lengths.shape[0]
    out = q.new_empty(tokens, h, e, dtype=out_dtype)
    lse = q.new_empty(tokens, h, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, None
    described = d <= WIDEST and describable(k_pages) and describable(v_pages)
    with on(q.device):
        key = paged_key(q, b, g, tokens * h // g, table.shape[1] * page, page, max(d, e), described)
        choice = choose_paged(key)
    call = Call(sink, alibi, None, None, (0, 0, 0, 0, 0), scale, softcap, out_dtype)
    seen = Sight(*sees[:4], tuple(sees[4:]))
    work = Work(seen, choice.tile_m, choice.tile_n, choice.wanted, choice.least, g, call.factors)
    rows, given = work.rows, (q, q_lengths, k_pages, v_pages, table, lengths)
    grid, numbers, merge_grid, merging = work.launches(*given)
    parts = lse.new_empty(rows * (e + 1))
    logs = parts[rows * e :]
    shared = {"B": sequences_of(b), "ONE": work.tiles(tokens, h, b) == 1, "SINK": sink is not None}
    merged = None
    with on(q.device), quiet():
        attended = paged_kernel[grid](
            q, q_lengths, describe(k_pages, choice.tile_n, choice), describe(v_pages, choice.tile_n, choice),
            table, lengths, out, lse, parts, logs, sink, alibi, *numbers,
            EARLY=choice.early, **shared, **flags_of(call, seen, choice, k_pages, v_pages),
        )  # fmt: skip
        if rows:
            merged = paged_merge_kernel[merge_grid](
                q_lengths, lengths, parts, logs, sink, out, lse, *merging,
                M=choice.tile_m, N=choice.tile_n, **shared, **merge_flags(choice.wanted, e, choice.early),
            )  # fmt: skip
    if attended is None or (rows and merged is None):
        return out, lse, None
    empty = out.new_empty(0), lse.new_empty(0)
    return out, lse, Repeated(work, attended, merged, *empty, (tokens, h, e), alike(k_pages, v_pages))


def sequences_of(b: int) -> int:
    """Sequences of the plan, one more than there are: a power of two, few of them, for each is compiled anew."""
    return 2 if b == 1 else max(16, 1 << b.bit_length())


def form(q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor) -> Hashable:
    """All that code, tiles and programs wanted depend on, of a call's sizes; None of what must be looked at anew.

    Of tensors whose addresses are aligned: others are launched by no plan.
    """
    (tokens, h, _), (pages, g, page, _), (b, width) = q.shape, k_pages.shape, table.shape
    strides = q.stride(), k_pages.stride(), v_pages.stride(), table.stride(), q_lengths.stride(), lengths.stride()
    if v_pages.shape[0] != pages or lengths.shape[0] != b or q_lengths.shape[0] != b or not 0 < b <= SEQUENCES:
        return None
    if (
        not (0 < tokens * h <= LONGEST and 0 < width * page <= LONGEST and pages)
        or max(strides[1][2], strides[2][2]) >= NEAR
    ):
        return None
    rows = tokens * h // g
    # See `choose_paged`: so many parts can be made, of which a small number only is wanted.
    most = -(-rows // 16), min(-(-width * page // LEAST_PAGED), MOST)
    height = padded(-(-rows // b))
    return kinds(*strides), b, tokens == 1, pages == 1, height, most if most[0] * most[1] < 8 * MOST else None


class Repeated(NamedTuple):
    """Launches on a paged cache, to be repeated on other tensors.

    Attributes:
        work: How the call is cut up.
        attended: The launch over the keys.
        merged: The launch that merges; None where keys are not split.
        out: An empty tensor of the dtype and device of ``out``.
        lse: The same of ``lse``.
        shape: Shape of ``out``.
        shared: Whether values were the first columns of the keys, for which another kernel is compiled.
    """

    work: Work
    attended: Bound
    merged: Bound | None
    out: Tensor
    lse: Tensor
    shape: tuple[int, int, int]
    shared: bool

    def resized(self, *given: Tensor) -> "Repeated":
        """Take the code to a problem of the same `form`."""
        grid, numbers, merge_grid, merging = self.work.launches(*given)
        attended = self.attended.resized(grid, numbers, *given)
        merged = self.merged and self.merged.resized(merge_grid, merging)
        return self._replace(attended=attended, merged=merged, shape=(given[0].shape[0], *self.shape[1:]))

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Launch on new results, and a new workspace; None if these tensors want another kernel."""
        if alike(given[2], given[3]) != self.shared:
            return None
        shape, rows = self.shape, self.work.rows
        out, lse = self.out.new_empty(shape), self.lse.new_empty(shape[:2])
        parts = self.lse.new_empty(rows * (shape[2] + 1))  # kept until all is launched
        results, space = (out.data_ptr(), lse.data_ptr()), parts.data_ptr()
        spaces = space, space + 4 * rows * shape[2]
        of = [0 if x is None else x.data_ptr() for x in given]
        launched = self.attended(*of[:6], *results, *spaces, *of[6:])
        if launched and self.merged is not None:
            launched = self.merged(of[1], of[5], *spaces, of[6], *results)
        return (out, lse) if launched else None


def flags_of(call: Call, seen: Sight, choice: PagedChoice, k_pages: Tensor, v_pages: Tensor) -> dict[str, Any]:
    """What the kernel is compiled for."""
    (page, d), e, (first, rest) = k_pages.shape[2:], v_pages.shape[3], pieces(k_pages.shape[3])
    return {
        "M": choice.tile_m, "N": choice.tile_n, "D": first, "D2": rest, "E": padded(e),
        "WHOLE_D": first <= d, "WHOLE_D2": first + rest == d, "WHOLE_E": padded(e) == e, "PAGE": page,
        "PREFIX": seen.prefix >= 0, "CHUNKS": len(seen.chunks), "KEEP": seen.keep > 0,
        "SOFTCAP": call.softcap is not None, "ALIBI": call.alibi is not None, "NEGATIVE": call.negative,
        "SHARED": alike(k_pages, v_pages), "FAR": any(choice.tile_n * x.stride(2) >= 2**31 for x in (k_pages, v_pages)),
        "DESCRIPTOR": choice.descriptors, "INTERPRET": INTERPRETED,
        "num_warps": choice.num_warps, "num_stages": choice.num_stages,
        **({"launch_pdl": True} if choice.early else {}),
    }  # fmt: skip


torch.library.define(
    "longspan::flash_attention_paged",
    "(Tensor q, Tensor q_lengths, Tensor k_pages, Tensor v_pages, Tensor table, Tensor lengths, Tensor? sink,"
    " Tensor? alibi, SymInt[] sees, float scale, float? softcap, ScalarType out_dtype) -> (Tensor, Tensor)",
)
torch.library.impl("longspan::flash_attention_paged", ("cuda", "cpu"), launch)


@torch.library.register_fake("longspan::flash_attention_paged")
def _(q: Tensor, _q_lengths: Tensor, _k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, h, _ = q.shape
    return q.new_empty(tokens, h, v_pages.shape[3], dtype=rest[-1]), q.new_empty(tokens, h, dtype=torch.float32)
