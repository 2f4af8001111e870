"""What `longspan tune` may choose of the kernels of few queries, and of paged caches: their tiles.

How the keys are split over programs follows from the tiles and the machine (`decode_choices`), so that one choice
serves every length. Problems are one token of 32 query and 8 key heads against caches that no L2 cache holds.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

import torch

from longspan.autotune import Case, Family, Values
from longspan.spec.masks import everything

from . import decode
from . import paged as pages
from .attention_families import draw, neighbourly
from .decode_choices import SOURCES, TileKey, tiles_by_rule
from .launch import Call, padded
from .lowering import lower

HEADS: Final = 32
GROUPS: Final = 8
PAGE: Final = 64  # keys
BATCH: Final = 8
KEYS: Final = 16_384
# Keys of a tile and the warps that share them.
TILES: Final = ((32, 4), (64, 4), (128, 4), (128, 8))
STAGES: Final = (2, 3, 4)
RESIDENT: Final = (1, 2, 4)  # programs of a multiprocessor for which the keys are split


def case(d: int, m: int, *, page: int = 0, h: int = HEADS, g: int = GROUPS, n: int = KEYS) -> Case:
    """One key: the head dimension, and how many rows a tile has."""
    rows = min(padded(m * h // g), 64)
    key = {"rows": rows, "width": padded(d), "itemsize": 2, "descriptors": True}
    problem = {"b": BATCH, "h": h, "g": g, "m": m, "n": n, "d": d, "causal": True, "page": page}
    return Case(key=key, problem=problem, variant={name: value for name, value in problem.items() if name != "n"})


def sized(sizes: Values, *, page: int = 0) -> list[Case]:
    """What a model's layer launches when it decodes."""
    h, g, d, n = (int(sizes[name]) for name in ("heads", "groups", "head_dim", "context"))
    if sizes["itemsize"] != 2 or d != sizes["value_dim"] or d > decode.WIDEST or not sizes["causal"]:
        return []
    return [case(d, 1, page=page, h=h, g=g, n=min(max(n, 4096), KEYS))]


def start(case: Case, arch: str, *, paged: bool) -> Values:
    """The choice that serves untuned."""
    values: Any = dict(case.key)
    tiles = tiles_by_rule(TileKey(paged=paged, architecture=arch, **values))._asdict()
    del tiles["tile_m"]
    return tiles


def space(case: Case, arch: str, *, paged: bool) -> Iterator[Values]:
    """Every tile, depth and residency."""
    del arch
    for (keys, warps), stages, resident in product(TILES, STAGES, RESIDENT):
        if not (paged and keys > PAGE) and not (int(case.key["width"]) > 128 and keys > 64):
            yield {"tile_n": keys, "num_warps": warps, "num_stages": stages, "resident": resident}


def prepare_few(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Decode from a dense cache."""
    sizes = {name: int(value) for name, value in case.problem.items()}
    b, h, g, m, n, d = (sizes[name] for name in ("b", "h", "g", "m", "n", "d"))
    q = draw((b, h, m, d), device, fill, 0)
    k, v = (draw((b, g, n, d), device, fill, seed) for seed in (1, 2))
    seen = lower(everything(), b, m, n, q_offset=None, k_offset=0, device=q.device)
    interval: Any = tuple(seen.interval)
    call = Call(None, None, seen.rows, seen.sequences, interval, 1 / math.sqrt(d), None, q.dtype)
    return lambda: decode.forward(call, q, k, v)


def prepare_paged(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Decode from a paged cache, whose pages lie in no order."""
    sizes = {name: int(value) for name, value in case.problem.items()}
    b, h, g, m, n, d, page = (sizes[name] for name in ("b", "h", "g", "m", "n", "d", "page"))
    q = draw((1, h, b * m, d), device, fill, 0)[0].transpose(0, 1)
    pools = [torch.empty(b * n // page, g, page, d, dtype=torch.bfloat16, device=device) for _ in range(2)]
    if fill:
        for seed, pool in enumerate(pools, 1):
            pool.normal_(generator=torch.Generator(device).manual_seed(seed))
    order = torch.randperm(b * n // page, generator=torch.Generator().manual_seed(3))
    table = order.to(torch.int32).reshape(b, -1).to(device)
    q_lengths, lengths = (torch.full((b,), value, dtype=torch.int32, device=device) for value in (m, n))
    sees = list(pages.sight(everything())[:4])
    scale = 1 / math.sqrt(d)
    return lambda: pages.launch(q, q_lengths, *pools, table, lengths, None, None, sees, scale, None, q.dtype)


def few() -> Family:
    """Declare the kernel of few queries."""

    def heuristic(case: Case, arch: str) -> Values:
        return start(case, arch, paged=False)

    return Family(
        name="flash.few", operation="attention_few", backend="longspan.backends.flash", sources=SOURCES["flash.few"],
        cases=lambda arch: [case(64, 1), case(128, 1), case(256, 1), case(128, 16)],  # noqa: ARG005
        space=lambda case, arch: list(space(case, arch, paged=False)), heuristic=heuristic, prepare=prepare_few,
        cost=neighbourly(heuristic), sized=lambda sizes, arch: sized(sizes),  # noqa: ARG005
    )  # fmt: skip


def paged() -> Family:
    """Declare the kernel of paged caches."""

    def heuristic(case: Case, arch: str) -> Values:
        return start(case, arch, paged=True)

    return Family(
        name="flash.paged", operation="attention_paged", backend="longspan.backends.flash",
        sources=SOURCES["flash.paged"], cases=lambda arch: [case(128, 1, page=PAGE)],  # noqa: ARG005
        space=lambda case, arch: list(space(case, arch, paged=True)), heuristic=heuristic, prepare=prepare_paged,
        cost=neighbourly(heuristic), sized=lambda sizes, arch: sized(sizes, page=PAGE),  # noqa: ARG005
    )  # fmt: skip
