"""What `longspan tune` may choose of a merge: rows and warps of a program.

Problems are parts of 32 heads of 128 columns for 8k queries, as rings and shards make them.
Shapes: b batch, h heads, m queries, e value dimension.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

import torch

from longspan.autotune import Case, Family, Values

from .attention_families import neighbourly, relatives
from .merge import launch
from .merge_choices import SOURCES, MergeKey, merge_by_rule

HEADS: Final = 32
TOKENS: Final = 8192
RAGGED: Final = {"ragged": {"m": 8187}}  # rows that no vector of lanes divides


def case(parts: int, dtype: str) -> Case:
    """One key."""
    problem = {"parts": parts, "b": 1, "h": HEADS, "m": TOKENS, "e": 128, "dtype": dtype}
    key = {"parts": parts, "columns": 128, "itemsize": getattr(torch, dtype).itemsize}
    return Case(key=key, problem=problem, variant={name: problem[name] for name in ("parts", "e", "dtype")})


def cases(arch: str) -> list[Case]:
    """Two parts and many, in the dtype of models and in that of parts that will be merged again."""
    del arch
    return [case(parts, dtype) for parts, dtype in product((2, 8), ("bfloat16", "float32"))]


def heuristic(case: Case, arch: str) -> Values:
    """The choice that serves untuned."""
    values: Any = dict(case.key)
    return merge_by_rule(MergeKey(architecture=arch, **values))._asdict()


def space(case: Case, arch: str) -> Iterator[Values]:
    """Two to thirty-two numbers of a part a lane."""
    del arch
    for rows, warps in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        if 2 <= rows * int(case.key["columns"]) // (32 * warps) <= 32:
            yield {"rows": rows, "num_warps": warps}


def prepare(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Merge parts by one launch."""
    b, h, m, e, parts = (int(case.problem[name]) for name in ("b", "h", "m", "e", "parts"))
    dtype = getattr(torch, str(case.problem["dtype"]))
    outs = tuple(torch.empty(b, h, m, e, dtype=dtype, device=device) for _ in range(parts))
    lses = tuple(torch.empty(b, h, m, device=device) for _ in range(parts))
    if fill:
        for seed, x in enumerate((*outs, *lses)):
            x.normal_(generator=torch.Generator(device).manual_seed(seed))
    return lambda: launch(outs, lses, None, dtype)


def merge() -> Family:
    """Declare the merge."""
    return Family(
        name="flash.merge", operation="merge", backend="longspan.backends.flash", sources=SOURCES["flash.merge"],
        cases=cases, space=lambda case, arch: list(space(case, arch)), heuristic=heuristic, prepare=prepare,
        cost=neighbourly(heuristic), relatives=lambda case, arch: relatives(case, RAGGED),  # noqa: ARG005
    )  # fmt: skip
