"""What `longspan tune` may choose of the rotation: how tokens and heads are shared out.

Problems are queries and keys of 32 and 8 heads of 128 coordinates, from few tokens to many, heads inside tokens as
projections leave them, or outside.
Shapes: b batch, h query heads, g key heads, m tokens, d head dimension.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

import torch

from longspan.autotune import Case, Family, Values
from longspan.spec import inv_freq

from . import rope_kernel
from .attention_families import draw, neighbourly, relatives
from .rope_choices import SOURCES, power_of_two, rope_by_rule

# What else a key serves; `append_` turns new keys under the same choice.
OTHERS: Final = {
    "interleaved": {"pairing": "interleaved", "rows": True},
    "axes": {"position": "abm"},
    "appended": {"appended": True},
}  # fmt: skip


def case(h: int, g: int, d: int, m: int, *, inside: bool) -> Case:
    """One key."""
    key = {
        "tokens": m.bit_length() - 1, "heads": power_of_two(max(h, g)), "planes": power_of_two(d // 2), "itemsize": 2,
        "inside": inside,
    }  # fmt: skip
    problem = {"b": 1, "h": h, "g": g, "m": m, "d": d, "inside": inside}
    return Case(key=key, problem=problem, variant={"h": h, "g": g, "d": d, "inside": inside})


def cases(arch: str) -> list[Case]:
    """One token in flight, a prompt, and a long one."""
    del arch
    return [case(32, 8, 128, 1 << power, inside=inside) for power, inside in product((6, 12, 15), (True, False))]


def sized(sizes: Values, arch: str) -> list[Case]:
    """What a model's layer launches when it reads a prompt, and when it decodes a batch."""
    del arch
    h, g, d, n = (int(sizes[name]) for name in ("heads", "groups", "head_dim", "context"))
    return [case(h, g, d, m, inside=True) for m in (64, min(n, 1 << 15))] if sizes["itemsize"] == 2 else []


def heuristic(case: Case, arch: str) -> Values:
    """The choice that serves untuned."""
    del arch
    sizes = case.problem
    return rope_by_rule(
        int(sizes["b"]) * int(sizes["m"]), max(int(sizes["h"]), int(sizes["g"])), int(sizes["d"]) // 2, 2,
        heads_inside=bool(sizes["inside"]),
    )._asdict()  # fmt: skip


def space(case: Case, arch: str) -> Iterator[Values]:
    """Tiles of two to sixteen numbers a lane, along heads or along tokens, and programs that share a token's heads."""
    del arch
    planes, few = int(case.key["planes"]), int(case.key["tokens"]) < 10
    for warps, numbers, heads in product(
        (1, 2) if few else (1, 2, 4), (8, 16), (2, 4, 8) if case.key["inside"] else (1, 2, 4)
    ):
        rows = numbers * 32 * warps // planes
        for split in (4, 8, 16) if few else (1, 2):
            if heads <= rows and split * heads <= int(case.key["heads"]):
                yield {"tokens": rows // heads, "heads": heads, "split": split, "num_warps": warps}


def prepare(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Turn queries and keys by one launch."""
    b, h, g, m, d = (int(case.problem[name]) for name in ("b", "h", "g", "m", "d"))
    given = [draw((b, heads, m, d), device, fill, seed) for seed, heads in enumerate((h, g))]
    if not case.problem["inside"]:
        given = [x.contiguous() for x in given]
    turned = [torch.empty_like(x) for x in given]
    position, speed = torch.arange(m, device=device), inv_freq(d).to(device)

    def run() -> list[torch.Tensor]:
        rope_kernel.launch(given, turned, position, speed, None, None, 1.0, False, False)
        return turned

    return run


def rotate() -> Family:
    """Declare the rotation."""
    return Family(
        name="flash.rotate", operation="rotate_qk", backend="longspan.backends.flash", sources=SOURCES["flash.rotate"],
        cases=cases, space=lambda case, arch: list(space(case, arch)), heuristic=heuristic, prepare=prepare,
        cost=neighbourly(heuristic), sized=sized, relatives=lambda case, arch: relatives(case, OTHERS),  # noqa: ARG005
    )  # fmt: skip
