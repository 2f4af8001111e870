"""What `longspan tune` may choose of the kernels of attention: keys, their choices, and launches to time.

Problems are those of DESIGN's tables cut down to a few milliseconds: 8k tokens in 2048 / d heads, more than four waves
of programs on any GPU of today, in bfloat16.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor

from longspan.autotune import Case, Family, Values
from longspan.spec import masks

from . import backward, forward
from .choices import SOURCES, Key, asked, brief, heuristic
from .launch import LOG2_E, Call, padded
from .lowering import lower

WIDTH: Final = 2048  # heads · head dimension
TOKENS: Final = 8192
SHORTER: Final = 1024  # tokens of a short prompt
WIDTHS: Final = (64, 128, 256)

# Rows and keys of a tile with the warps that share them, and stages, by kernel and width. What no tensor core of today
# would like, or no register file hold, is left out; whether the rest compiles well, only a compilation says.
TILES: Final[dict[tuple[str, int], tuple[list[tuple[int, int, int]], tuple[int, ...]]]] = {
    ("forward", 64): (
        [(64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8)], (2, 3, 4)),
    ("forward", 128): (
        [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8)], (2, 3, 4)),
    ("forward", 256): ([(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)], (1, 2, 3)),
    ("backward_keys", 64): (
        [(64, 64, 4), (32, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)], (2, 3, 4)),
    ("backward_keys", 128): (
        [(32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 128, 8), (64, 128, 8), (128, 64, 8)], (1, 2, 3)),
    ("backward_keys", 256): ([(32, 64, 4), (32, 64, 8), (64, 64, 8), (64, 32, 4), (64, 32, 8)], (1, 2)),
    ("backward_queries", 64): (
        [(64, 64, 4), (64, 32, 4), (128, 64, 4), (128, 64, 8), (128, 32, 4), (128, 128, 8)], (2, 3, 4)),
    ("backward_queries", 128): (
        [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 4), (128, 32, 8), (128, 64, 8)], (1, 2, 3)),
    ("backward_queries", 256): ([(64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 32, 8), (128, 64, 8)], (1, 2)),
}  # fmt: skip

# What else a key serves compiles other code: options of problems of m queries, n keys and b sequences, by name.
CAUSAL: Final = {
    "documents": {
        "mask": "documents([{m} - {m} // 3, {m} // 3], [{n} - {n} // 3, {n} // 3])"
        " & window({m} // 2, keep_first=3) & causal()",
        "softcap": 9.0, "alibi": 0.5, "sink": 1.0,
    },
    "lengths": {"mask": "lengths([{n} - 9 * row for row in range({b})]) & causal()", "scale": -0.2},
}  # fmt: skip
FULL: Final = {"scores": {"mask": "everything()", "softcap": 9.0, "alibi": 0.5, "sink": 1.0}}


def relatives(case: Case, options: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """The same key with other options."""
    return [
        Case(key=case.key, problem={**case.problem, **more}, variant={**case.variant, "features": name})
        for name, more in options.items()
    ]


def cases(kernel: str, arch: str) -> list[Case]:
    """Every width, under a mask and without, on tensors that can be described; and prompts that are short."""
    made = []
    for width, masked in product(WIDTHS, (True, False)):
        problem = {"b": 1, "h": WIDTH // width, "m": TOKENS, "d": width, "causal": masked}
        # Masks are integers to the kernels, so that code is compiled for the width alone.
        variant = {"kernel": kernel, "width": width, "h": WIDTH // width}
        made.append(Case(key=key_values(kernel, arch, width, TOKENS, masked=masked), problem=problem, variant=variant))
        brief_key = key_values(kernel, arch, width, SHORTER, masked=masked)
        if brief_key != made[-1].key:
            problem = {**problem, "b": TOKENS // SHORTER, "m": SHORTER}
            made.append(Case(key=brief_key, problem=problem, variant=variant))
    return made


def key_values(kernel: Any, arch: str, width: int, keys: int, *, masked: bool) -> Values:
    """The key of a launch on so many keys, as tables know it."""
    key = Key(kernel=kernel, architecture=arch, width=width, itemsize=2, masked=masked, descriptors=True)
    return asked(brief(key, keys)).key


def sized(kernel: str, sizes: Values, arch: str) -> list[Case]:
    """What a model's layer launches: its own heads, on as many of its tokens as take a few milliseconds."""
    if sizes["itemsize"] != 2:
        return []
    width, heads = padded(max(int(sizes["head_dim"]), int(sizes["value_dim"]))), int(sizes["heads"])
    tokens = min(int(sizes["context"]), max(1024, TOKENS * WIDTH // (heads * width) // 128 * 128))
    causal = bool(sizes["causal"])
    if width not in WIDTHS:
        return []
    problem = {
        "b": 1, "h": heads, "g": int(sizes["groups"]), "m": tokens, "d": int(sizes["head_dim"]),
        "e": int(sizes["value_dim"]), "causal": causal,
    }  # fmt: skip
    key = key_values(kernel, arch, width, tokens, masked=causal)
    return [Case(key=key, problem=problem, variant={"kernel": kernel, **problem, "causal": False, "m": 0})]


def key_of(kernel: Any, case: Case, arch: str) -> Key:
    """The key that a launch of a case would have."""
    values: Any = dict(case.key)
    return Key(kernel=kernel, architecture=arch, **values)


def space(kernel: str, case: Case, arch: str) -> Iterator[Values]:
    """Every tile with every depth, through descriptors and through pointers."""
    tiles, stages = TILES[kernel, int(case.key["width"])]
    described = (False, True) if arch in {"sm_90", "sm_100", "sm_103", "sm_120", "sm_121"} else (False,)
    for (rows, keys, warps), depth, descriptors in product(tiles, stages, described):
        yield {
            "tile_m": rows, "tile_n": keys, "num_warps": warps, "num_stages": depth, "descriptors": descriptors,
        }  # fmt: skip


def neighbourly(start: Callable[[Case, str], Values]) -> Callable[[Case, Values, str], float]:
    """Order choices by how far they are from what serves, in doublings: its neighbours come before strangers."""

    def cost(case: Case, choice: Values, arch: str) -> float:
        apart = 0.0
        for name, value in start(case, arch).items():
            mine = choice[name]
            if isinstance(value, bool):
                apart += float(mine != value)
            else:
                apart += abs(math.log2(float(mine) / float(value)))
        return apart

    return cost


def draw(shape: tuple[int, ...], device: str, fill: bool, seed: int) -> Tensor:
    """Heads ``[b, h, tokens, d]`` that lie as models have them, tokens outside; filled with numbers if asked to."""
    b, h, tokens, d = shape
    laid = torch.empty(b, tokens, h, d, dtype=torch.bfloat16, device=device)  # other programs' memory, until filled
    if fill:
        laid.normal_(generator=torch.Generator(device).manual_seed(seed))
    return laid.transpose(1, 2)


def mask_of(problem: Values, b: int, m: int, n: int) -> masks.Mask:
    """The mask of a problem: its own words', or causal or none."""
    words = str(problem.get("mask", "causal()" if problem["causal"] else "everything()"))
    return eval(words.format(b=b, m=m, n=n), dict(vars(masks)))  # noqa: S307 - words of families alone


def call_of(case: Case, q: Tensor, n: int) -> Call:
    """What a case asks of q and n keys, beside its tensors."""
    problem: Any = case.problem
    b, h, m, d = q.shape
    seen = lower(mask_of(problem, b, m, n), b, m, n, q_offset=None, k_offset=0, device=q.device)
    low, high, stop, position, keep = seen.interval
    sink, alibi = (q.new_ones(h, dtype=torch.float32) if name in problem else None for name in ("sink", "alibi"))
    return Call(
        sink, alibi, seen.rows, seen.sequences, (low, high, stop, position, keep),
        problem.get("scale", 1 / math.sqrt(d)), problem.get("softcap"),
        getattr(torch, problem["out_dtype"]) if "out_dtype" in problem else q.dtype,
    )  # fmt: skip


def heads_of(case: Case, device: str, fill: bool) -> list[Tensor]:
    """Draw queries, keys, values and the gradient of out."""
    sizes = {name: int(value) for name, value in case.problem.items() if not isinstance(value, str)}
    b, h, m, d = (sizes[name] for name in ("b", "h", "m", "d"))
    g, e = sizes.get("g", h), sizes.get("e", d)
    shapes = (b, h, m, d), (b, g, m, d), (b, g, m, e), (b, h, m, e)
    return [draw(shape, device, fill, seed) for seed, shape in enumerate(shapes)]


def prepare_forward(case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Launch the forward kernel."""
    q, k, v, _ = heads_of(case, device, fill)
    call = call_of(case, q, k.shape[2])
    return lambda: forward.forward(call, q, k, v)


def prepare_backward(kernel: str, case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Launch one of the backward kernels, on what the forward kernel and the first backward kernel leave."""
    q, k, v, d_out = heads_of(case, device, fill)
    call = call_of(case, q, k.shape[2])
    two = torch.empty(2, *q.shape[:3], device=device)
    if fill:
        out, lse = forward.forward(call, q, k, v)
        two[0], two[1] = lse * LOG2_E, (out.float() * d_out.float()).sum(-1)
    lse_two, delta = two
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))

    def keys() -> tuple[Tensor, Tensor]:
        backward.launch_keys(call, q, k, v, d_out, lse_two, delta, dk, dv)
        return dk, dv

    def queries() -> Tensor:
        backward.launch_queries(call, q, k, v, d_out, lse_two, delta, dq)
        return dq

    return keys if kernel == "backward_keys" else queries


def attention(kernel: Any) -> Family:
    """Declare one of the kernels of attention."""

    def start(case: Case, arch: str) -> Values:
        return vars(heuristic(key_of(kernel, case, arch)))

    def prepare(case: Case, device: str, fill: bool) -> Callable[[], Any]:
        if kernel == "forward":
            return prepare_forward(case, device, fill)
        return prepare_backward(kernel, case, device, fill)

    return Family(
        name=f"flash.{kernel}", operation="attention" if kernel == "forward" else "attention_backward",
        backend="longspan.backends.flash", sources=SOURCES[f"flash.{kernel}"],
        cases=lambda arch: cases(kernel, arch), space=lambda case, arch: list(space(kernel, case, arch)),
        sized=lambda sizes, arch: sized(kernel, sizes, arch), heuristic=start, prepare=prepare,
        cost=neighbourly(start),
        relatives=lambda case, arch: relatives(case, CAUSAL if case.key["masked"] else FULL),  # noqa: ARG005
    )  # fmt: skip
