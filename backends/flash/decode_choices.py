"""How few queries against many keys are cut up: the tiles of the kernel, and how many programs share a row tile's keys.

A documented heuristic, from shapes and the machine alone: no length that only the device knows is read.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

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
    """

    architecture: str
    processors: int
    heads: int
    rows: int
    keys: int
    width: int
    itemsize: int


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
        early: See `FewChoice`.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    wanted: int
    least: int
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


LEAST: Final = 256  # keys of a split: fewer cost more to merge than they save
MOST: Final = 256  # splits
WAVES: Final = 4  # of programs: the last one, which fills the machine in part, then matters less
LARGE: Final = ("sm_90", "sm_100", "sm_103")  # 228 KB of shared memory
HOPPER: Final = (*LARGE, "sm_120", "sm_121")  # one kernel may be launched before another is done


def choose_few(key: FewKey) -> FewChoice:
    """Choose tiles by architecture and width, then splits so that the programs fill the machine."""
    if key.architecture == "interpreter":
        return FewChoice(tile_m=16, tile_n=16, num_warps=1, num_stages=1, splits=3)
    tile_m, tile_n, num_warps, num_stages, resident = tiles_for(key.architecture, key.rows, key.width, key.itemsize)
    programs = key.heads * -(-key.rows // tile_m)
    splits = splits_for(programs, key.processors * resident, -(-key.keys // max(LEAST, tile_n)))
    return FewChoice(
        tile_m=tile_m, tile_n=tile_n, num_warps=num_warps, num_stages=num_stages, splits=splits,
        early=key.architecture in HOPPER,
    )  # fmt: skip


def choose_paged(key: PagedKey) -> PagedChoice:
    """Choose tiles by architecture, width and the mean number of queries, then about four waves of programs."""
    if key.architecture == "interpreter":
        return PagedChoice(tile_m=16, tile_n=16, num_warps=1, num_stages=1, wanted=3, least=1)
    rows = -(-key.rows // max(key.sequences, 1))
    tile_m, tile_n, num_warps, num_stages, resident = tiles_for(key.architecture, rows, key.width, key.itemsize)
    most = -(-key.rows // tile_m) * -(-key.keys // max(LEAST, tile_n)) + key.sequences
    wanted = min(-(-WAVES * key.processors * resident // key.heads), most, MOST)
    return PagedChoice(
        tile_m=tile_m, tile_n=tile_n, num_warps=num_warps, num_stages=num_stages, wanted=wanted,
        least=-(-LEAST // tile_n), early=key.architecture in HOPPER,
    )  # fmt: skip


def tiles_for(architecture: str, rows: int, width: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Tile of rows and keys, warps, stages, and how many such programs a multiprocessor holds."""
    tile_m, width = min(padded(rows), 64), padded(width)
    if itemsize == 4:
        return 16, 32 if width <= 128 else 16, 4, 2 if width <= 256 else 1, 2
    if architecture.startswith("gfx"):
        return tile_m, 64 if width <= 128 else 32, 4, 2 if width <= 64 else 1, 2
    if width > 256:
        return tile_m, 32 if tile_m > 16 else 16, 8, 2, 1
    large = architecture in LARGE
    if width > 128:
        return tile_m, 32, 4, 3 if large else 2, 2 if large else 1
    return tile_m, 64, 4, 3 if large or width <= 64 else 2, 2 if large else 1


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
    return next(splits for splits in range(1, most + 1) if full(splits) >= 0.9 * best)


@cache
def processors(index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def few_key(x: torch.Tensor, heads: int, rows: int, keys: int, width: int) -> FewKey:
    """Describe a problem whose queries are x."""
    return FewKey(
        architecture=architecture(), processors=1 if INTERPRETED else processors(x.device.index or 0),
        heads=heads, rows=rows, keys=keys, width=width, itemsize=x.element_size(),
    )  # fmt: skip


def paged_key(x: torch.Tensor, sequences: int, heads: int, rows: int, keys: int, page: int, width: int) -> PagedKey:
    """Describe a problem whose queries are x."""
    return PagedKey(
        architecture=architecture(), processors=1 if INTERPRETED else processors(x.device.index or 0),
        sequences=sequences, heads=heads, rows=rows, keys=keys, page=page, width=width, itemsize=x.element_size(),
    )  # fmt: skip
