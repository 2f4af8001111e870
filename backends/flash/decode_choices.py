"""How few queries against many keys are cut up: the tiles of the kernel, and how many programs share a row tile's keys.

Tiles that were tuned on this GPU (`longspan.autotune`), or else by a documented heuristic; and splits from shapes and
the machine alone: no length that only the device knows is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, NamedTuple

import torch

from longspan.autotune import Asked, Lookup, Values, checked

from .choices import bounded
from .launch import INTERPRETED, architecture, padded


@dataclass(frozen=True, kw_only=True)
class FewChoice:
    """Launch parameters of the kernels of few queries; hashable, printable, JSON-able.

    Attributes:
        tile_m: Rows of a tile: queries of the heads that share a key head.
        tile_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        splits: Programs that share the keys of a row tile.
        descriptors: Whether tiles are loaded through tensor descriptors.
        early: Whether the kernel that merges is launched before the parts are there (sm_90 and up).
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    splits: int
    descriptors: bool = False
    early: bool = False


@dataclass(frozen=True, kw_only=True)
class FewKey:
    """What a choice may depend on.

    Attributes:
        architecture: ``sm_90``, ``gfx942``, …, or ``interpreter``.
        processors: Multiprocessors of the device.
        heads: Sequences times key heads.
        rows: Queries of one sequence times the heads that share a key head.
        keys: Keys that a row tile may see.
        width: The larger of head and value dimension.
        itemsize: Bytes of an element of q.
        descriptors: Whether the tensors' strides and alignment allow tensor descriptors.
    """

    architecture: str
    processors: int
    heads: int
    rows: int
    keys: int
    width: int
    itemsize: int
    descriptors: bool = False


@dataclass(frozen=True, kw_only=True)
class PagedChoice:
    """Launch parameters of the kernels of paged caches; hashable, printable, JSON-able.

    Attributes:
        tile_m: See `FewChoice`, as for the next three.
        tile_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        wanted: Programs per key head between which the keys of all sequences are shared; 1 splits no keys.
        least: Key tiles of a part, at least.
        descriptors: See `FewChoice`; taken up where a tile lies in one page.
        early: See `FewChoice`.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    wanted: int
    least: int
    descriptors: bool = False
    early: bool = False


@dataclass(frozen=True, kw_only=True)
class PagedKey:
    """What a choice may depend on.

    Attributes:
        architecture: See `FewKey`, as for the next.
        processors: Multiprocessors of the device.
        sequences: Sequences.
        heads: Key heads.
        rows: Queries of all sequences times the heads that share a key head.
        keys: Keys that a row of the table holds.
        page: Keys of a page.
        width: The larger of head and value dimension.
        itemsize: Bytes of an element of q.
        descriptors: Whether the tensors' strides and alignment allow tensor descriptors.
    """

    architecture: str
    processors: int
    sequences: int
    heads: int
    rows: int
    keys: int
    page: int
    width: int
    itemsize: int
    descriptors: bool = False


@dataclass(frozen=True, kw_only=True)
class TileKey:
    """What tiles depend on; the rest of a choice is reckoned from them.

    Attributes:
        paged: Whether keys lie on pages.
        architecture: See `FewKey`.
        rows: Rows of a tile.
        width: The larger of head and value dimension, padded to a power of two.
        itemsize: Bytes of an element of q.
        descriptors: See `FewKey`.
    """

    paged: bool
    architecture: str
    rows: int
    width: int
    itemsize: int
    descriptors: bool


class Tiles(NamedTuple):
    """What fits a multiprocessor, ``resident`` times."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    resident: int


LEAST: Final = 256  # keys of a split: fewer cost more to merge than they save; a tile has no more
LEAST_PAGED: Final = 512  # keys of a part, likewise
MOST: Final = 256  # splits
SMALLEST: Final = 64  # keys of a tile that the copy engine loads from a page
LARGE: Final = ("sm_90", "sm_100", "sm_103")  # 228 KB of shared memory
HOPPER: Final = (*LARGE, "sm_120", "sm_121")  # one kernel may be launched before another is done


def choose_few(key: FewKey) -> FewChoice:
    """Choose tiles by architecture and width, then splits so that the programs fill the machine."""
    if key.architecture == "interpreter":
        return FewChoice(tile_m=16, tile_n=16, num_warps=1, num_stages=1, splits=3)
    key = replace(key, descriptors=copied(key))
    tiles = tiles_for(key, key.rows)
    programs = key.heads * -(-key.rows // tiles.tile_m)
    splits = splits_for(programs, key.processors * tiles.resident, -(-key.keys // max(LEAST, tiles.tile_n)))
    return FewChoice(
        tile_m=tiles.tile_m, tile_n=tiles.tile_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        splits=splits, descriptors=key.descriptors, early=key.architecture in HOPPER,
    )  # fmt: skip


def choose_paged(key: PagedKey) -> PagedChoice:
    """Choose tiles by architecture, width and the mean number of queries, then one wave of programs.

    A tile of the copy engine lies in one page.
    """
    if key.architecture == "interpreter":
        return PagedChoice(tile_m=16, tile_n=16, num_warps=1, num_stages=1, wanted=3, least=1)
    key = replace(key, descriptors=copied(key) and key.page % SMALLEST == 0)
    tiles = tiles_for(key, -(-key.rows // max(key.sequences, 1)))
    tile_n = SMALLEST if key.descriptors and key.page % tiles.tile_n else tiles.tile_n
    places = key.processors * max(1, tiles.resident * tiles.tile_n // tile_n)
    most = -(-key.rows // tiles.tile_m) * -(-key.keys // LEAST_PAGED) + key.sequences
    return PagedChoice(
        tile_m=tiles.tile_m, tile_n=tile_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        wanted=max(1, min(places // key.heads, most, MOST)), least=-(-LEAST_PAGED // tile_n),
        descriptors=key.descriptors, early=key.architecture in HOPPER,
    )  # fmt: skip


def tiles_for(key: FewKey | PagedKey, rows: int) -> Tiles:
    """Cut tiles as was tuned on this GPU, or by the rule, for so many rows that share a key head."""
    return TUNED(tile_key(key, rows))


def tile_key(key: FewKey | PagedKey, rows: int) -> TileKey:
    """What tiles of so many rows depend on."""
    return TileKey(
        paged=isinstance(key, PagedKey), architecture=key.architecture, rows=min(padded(rows), tallest(key)),
        width=padded(key.width), itemsize=key.itemsize, descriptors=key.descriptors,
    )  # fmt: skip


def copied(key: FewKey | PagedKey) -> bool:
    """Whether the copy engine shall load the tiles: where it can, and of two bytes, for which registers suffice."""
    return key.descriptors and key.architecture in LARGE and key.itemsize == 2


def tallest(key: FewKey | PagedKey) -> int:
    """Rows of the tallest tile: prompts that are read in chunks want it as tall as fits."""
    if isinstance(key, PagedKey) and key.width > 256:
        return 32  # beyond, registers spill by the kilobyte
    return 128 if key.architecture in LARGE and key.width <= 128 and key.itemsize == 2 else 64


def asked(key: TileKey) -> Asked:
    """Write a key as tables know it."""
    values = {name: value for name, value in vars(key).items() if name not in {"paged", "architecture"}}
    return Asked("flash.paged" if key.paged else "flash.few", key.architecture, values)


def build(key: TileKey, values: Values) -> Tiles:
    """Make tiles of a row's; those of float32 have rows of their own."""
    made: Any = dict(bounded(checked(values, ("tile_n", "num_warps"), ("num_stages", "resident")), "tile_n"))
    return Tiles(16 if key.itemsize == 4 else key.rows, **made)


def tiles_by_rule(key: TileKey) -> Tiles:
    """Cut tiles by what fits the registers and the shared memory."""
    tile_m, width = key.rows, key.width
    if key.itemsize == 4:
        return Tiles(16, 32 if width <= 128 else 16, 4, 2 if width <= 256 else 1, 2)
    if width > 256:
        return Tiles(tile_m, 32, 8, 3, 1) if key.architecture in LARGE else Tiles(16, 16, 8, 2, 2)
    if key.architecture.startswith("gfx"):
        return Tiles(tile_m, 64 if width <= 128 else 32, 4, 2 if width <= 64 else 1, 2)
    if key.architecture in LARGE:
        return large(tile_m, width, key.descriptors)
    if width > 128:
        return Tiles(tile_m, 32, 4, 2, 1)
    return Tiles(tile_m, 64, 8 if tile_m > 32 else 4, 3, 1)


def large(tile_m: int, width: int, descriptors: bool) -> Tiles:
    """Cut tiles for 228 KB of shared memory. Raced on an H200 (triton 3.6.0, bf16, 16 rows, width 128)."""
    if not descriptors:
        return Tiles(tile_m, 32 if width > 128 else 64, 8 if tile_m > 32 else 4, 3, 2 if tile_m < 64 else 1)
    if width > 128 or tile_m > 32:
        return Tiles(tile_m, 64, 8 if tile_m > 64 else 4, 3, 1)
    return Tiles(tile_m, 128, 4, 3, 1) if width > 64 else Tiles(tile_m, 128, 4, 3, 2)


def splits_for(programs: int, places: int, most: int) -> int:
    """Find the least split count whose waves are nearly as full as any's.

    Args:
        programs: Programs of one split.
        places: Programs that the machine holds at once.
        most: Splits that leave each enough keys.
    """
    most = max(1, min(most, MOST, -(-4 * places // programs)))

    def full(splits: int) -> float:
        waves = programs * splits / places
        return waves / -(-programs * splits // places)

    best = max(map(full, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if full(splits) >= 0.95 * best)


@cache
def processors(index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def few_key(x: torch.Tensor, heads: int, rows: int, keys: int, width: int, descriptors: bool) -> FewKey:
    """Describe a problem whose queries are x."""
    return FewKey(
        architecture=architecture(), processors=1 if INTERPRETED else processors(x.device.index or 0),
        heads=heads, rows=rows, keys=keys, width=width, itemsize=x.element_size(), descriptors=descriptors,
    )  # fmt: skip


def paged_key(
    x: torch.Tensor, sequences: int, heads: int, rows: int, keys: int, page: int, width: int, descriptors: bool
) -> PagedKey:
    """Describe a problem whose queries are x."""
    return PagedKey(
        architecture=architecture(), processors=1 if INTERPRETED else processors(x.device.index or 0),
        sequences=sequences, heads=heads, rows=rows, keys=keys, page=page, width=width, itemsize=x.element_size(),
        descriptors=descriptors,
    )  # fmt: skip


# What is compiled for them: tiles that were tuned for other code do not serve.
SOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "flash.few": tuple(f"longspan.backends.flash.decode_kernel:{name}" for name in ("few_kernel", "few_merge_kernel")),
    "flash.paged": tuple(
        f"longspan.backends.flash.paged_kernel:{name}" for name in ("paged_kernel", "paged_merge_kernel")
    ),
}
TUNED: Final[Lookup[TileKey, Tiles]] = Lookup(asked, build, tiles_by_rule, SOURCES)
