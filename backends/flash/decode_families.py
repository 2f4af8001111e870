"""What `longspan tune` may choose of the kernels of few queries, and of paged caches: their tiles.

How the keys are split over programs follows from the tiles and the machine (`decode_choices`), so that one choice
serves every length. Problems are one token of 32 query and 8 key heads against caches that no L2 cache holds.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Final

import torch

from longspan.autotune import Case, Family, Values

from . import decode
from . import paged as pages
from .attention_families import CAUSAL, call_of, draw, mask_of, neighbourly, relatives
from .decode_choices import SOURCES, FewKey, PagedKey, TileKey, copied, tile_key, tiles_by_rule

HEADS: Final = 32
GROUPS: Final = 8
PAGE: Final = 64  # keys
BATCH: Final = 8
KEYS: Final = 16_384
# Keys of a tile and the warps that share them.
TILES: Final = ((32, 4), (64, 4), (128, 4), (128, 8))
STAGES: Final = (2, 3, 4)
RESIDENT: Final = (1, 2, 4)  # programs of a multiprocessor for which the keys are split


# What else a key serves; see `attention_families`. Masks of pages are in coordinates of each sequence.
FEW: Final = {
    **CAUSAL,
    "documents": {
        **CAUSAL["documents"],
        "mask": "documents([{m} - {m} // 2, {m} // 2], [{n} // 3, {n} - {n} // 3]) & window({n} // 2, keep_first=3)"
        " & causal()",
    },
}
PAGED: Final = {
    "window": {"mask": "causal() & window(70, keep_first=3)", "softcap": 9.0, "alibi": 0.5, "sink": 1.0},
    "chunks": {"mask": "chunks(100) & causal()", "scale": -0.2},
}  # fmt: skip


def case(arch: str, d: int, m: int, *, page: int = 0, h: int = HEADS, g: int = GROUPS, n: int = KEYS) -> Case:
    """One key: the head dimension, and how many rows a tile has."""
    problem = {"b": BATCH, "h": h, "g": g, "m": m, "n": n, "d": d, "causal": True, "page": page}
    of: Any = {"architecture": arch, "processors": 0, "heads": BATCH * g, "keys": n, "width": d, "itemsize": 2}
    full = PagedKey(**of, rows=BATCH * m * h // g, sequences=BATCH, page=page, descriptors=True) if page else FewKey(
        **of, rows=m * h // g, descriptors=True
    )  # fmt: skip
    key = vars(tile_key(replace(full, descriptors=copied(full)), m * h // g)).copy()
    del key["paged"], key["architecture"]
    return Case(key=key, problem=problem, variant={name: value for name, value in problem.items() if name != "n"})


def cases(arch: str) -> list[Case]:
    """Tokens one by one at every width, and several: each key once."""
    made = [case(arch, 64, 1), case(arch, 128, 1), case(arch, 256, 1), case(arch, 128, 16), case(arch, 128, 32)]
    return list({one.name: one for one in reversed(made)}.values())[::-1]


def sized(sizes: Values, arch: str, *, page: int = 0) -> list[Case]:
    """What a model's layer launches when it decodes."""
    h, g, d, n = (int(sizes[name]) for name in ("heads", "groups", "head_dim", "context"))
    if sizes["itemsize"] != 2 or d != sizes["value_dim"] or d > decode.WIDEST or not sizes["causal"]:
        return []
    return [case(arch, d, 1, page=page, h=h, g=g, n=min(max(n, 4096), KEYS))]


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


def sizes_of(case: Case) -> dict[str, int]:
    """The numbers of a problem that say how large it is."""
    return {name: int(case.problem[name]) for name in ("b", "h", "g", "m", "n", "d", "page")}


def prepare_few(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Decode from a dense cache."""
    b, h, g, m, n, d, _ = sizes_of(case).values()
    q = draw((b, h, m, d), device, fill, 0)
    k, v = (draw((b, g, n, d), device, fill, seed) for seed in (1, 2))
    call = call_of(case, q, n)
    return lambda: decode.forward(call, q, k, v)


def prepare_paged(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Decode from a paged cache, whose pages lie in no order."""
    b, h, g, m, n, d, page = sizes_of(case).values()
    q = draw((1, h, b * m, d), device, fill, 0)[0].transpose(0, 1)
    pools = [torch.empty(b * n // page, g, page, d, dtype=torch.bfloat16, device=device) for _ in range(2)]
    if fill:
        for seed, pool in enumerate(pools, 1):
            pool.normal_(generator=torch.Generator(device).manual_seed(seed))
    order = torch.randperm(b * n // page, generator=torch.Generator().manual_seed(3))
    table = order.to(torch.int32).reshape(b, -1).to(device)
    q_lengths, lengths = (torch.full((b,), value, dtype=torch.int32, device=device) for value in (m, n))
    seen = pages.sight(mask_of(case.problem, b, m, n))
    scale: Any = case.problem.get("scale", 1 / math.sqrt(d))
    softcap: Any = case.problem.get("softcap")
    sink, alibi = (q.new_ones(h, dtype=torch.float32) if name in case.problem else None for name in ("sink", "alibi"))
    return lambda: pages.launch(
        q, q_lengths, *pools, table, lengths, sink, alibi, [*seen[:4], *seen.chunks],
        scale, softcap, q.dtype,
    )  # fmt: skip


def few() -> Family:
    """Declare the kernel of few queries."""

    def heuristic(case: Case, arch: str) -> Values:
        return start(case, arch, paged=False)

    return Family(
        name="flash.few", operation="attention_few", backend="longspan.backends.flash", sources=SOURCES["flash.few"],
        cases=cases,
        space=lambda case, arch: list(space(case, arch, paged=False)), heuristic=heuristic, prepare=prepare_few,
        cost=neighbourly(heuristic), sized=sized, relatives=lambda case, arch: relatives(case, FEW),  # noqa: ARG005
    )  # fmt: skip


def paged() -> Family:
    """Declare the kernel of paged caches."""

    def heuristic(case: Case, arch: str) -> Values:
        return start(case, arch, paged=True)

    return Family(
        name="flash.paged", operation="attention_paged", backend="longspan.backends.flash",
        sources=SOURCES["flash.paged"], cases=lambda arch: [case(arch, 128, 1, page=PAGE)],
        space=lambda case, arch: list(space(case, arch, paged=True)), heuristic=heuristic, prepare=prepare_paged,
        cost=neighbourly(heuristic), sized=lambda sizes, arch: sized(sizes, arch, page=PAGE),
        relatives=lambda case, arch: relatives(case, PAGED),  # noqa: ARG005
    )  # fmt: skip
