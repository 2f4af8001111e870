"""What `longspan tune` may choose of this backend's kernels: tiles, stages, and what shares the L2 cache.

On anything but sm_90, and without Gluon, there is nothing to tune. Problems are those of `flash`'s families.
Shapes: b batch, h query heads, g key heads, m tokens, d head dimension, e value dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from itertools import product
from typing import Any, Final

import torch

from longspan.autotune import Case, Family, Values

from ..flash.attention_families import CAUSAL, TOKENS, WIDTH, call_of, heads_of, neighbourly, relatives
from .launch import SOURCES, Call, padded

ARCH: Final = "sm_90"
WIDTHS: Final = ((64, 64), (128, 128), (192, 128), (256, 256))
MASKS: Final = ("causal", "everything", "documents")
# Packed documents of mixed length, of m queries and n keys.
PACKED: Final = "documents(*([tokens * share // 16 for share in (1, 2, 4, 1, 3, 2, 1, 2)] for tokens in ({m}, {n})))"
STEP: Final = 128  # keys of the longest tile: where it divides all, the kernel without a mask has no ragged end

# What else a key serves; see `flash.attention_families`.
FORWARD: Final = {
    "causal": {
        "window": {"mask": "causal() & window({n} // 2)", "sink": 1.0, "out_dtype": "float32"}, "shifted": {"shift": 8},
    },
    "everything": {"ragged": {"m": TOKENS - 2, "step": 1, "sink": 1.0}},
    "documents": CAUSAL,
}  # fmt: skip
BACKWARD: Final = {
    "causal": {"lengths": {**CAUSAL["lengths"], "alibi": 0.5}, "window": FORWARD["causal"]["window"]},
    "everything": {"ragged": {"m": TOKENS - 2, "step": 1, "sink": 1.0, "alibi": 0.5}},
    "documents": {"documents": CAUSAL["documents"]},
}  # fmt: skip


def cases(kernel: str, arch: str) -> list[Case]:
    """Every width under a mask and without, and packed documents."""
    if arch != ARCH or find_spec("triton.experimental.gluon") is None:
        return []
    return [
        case(kernel, mask, h=WIDTH // padded(e), g=WIDTH // padded(e), m=TOKENS, d=d, e=e)
        for (d, e), mask in product(WIDTHS, MASKS) if mask == "causal" or d == e
    ]  # fmt: skip


def case(kernel: str, mask: str, *, h: int, g: int, m: int, d: int, e: int) -> Case:
    """One key."""
    problem: dict[str, Any] = {"b": 1, "h": h, "g": g, "m": m, "d": d, "e": e, "causal": mask != "everything"}
    problem |= {"causal": {}, "everything": {"step": STEP}, "documents": {"mask": f"{PACKED} & causal()"}}[mask]
    of = {"d": d, "e": e, "mask": mask, "kernel": kernel}
    return Case(key=key_of(kernel, mask, d, e), problem=problem, variant=of)


def key_of(kernel: str, mask: str, d: int, e: int) -> Values:
    """The key that a launch of a case would have."""
    if kernel == "forward":
        from .choices import Key, widths  # noqa: PLC0415 - Gluon is slow to import, and of no use elsewhere

        return Key(*widths(d, e), masked=mask != "everything", rich=mask == "documents")._asdict()
    from .backward import widths as columns  # noqa: PLC0415
    from .backward_choices import Key as BackwardKey  # noqa: PLC0415

    return BackwardKey(*columns(d, e), plain=mask != "documents", even=mask == "everything")._asdict()


def sized(kernel: str, sizes: Values, arch: str) -> list[Case]:
    """What a model's layer launches: its own heads, on as many of its tokens as take a few milliseconds."""
    h, g, d, e, n = (int(sizes[name]) for name in ("heads", "groups", "head_dim", "value_dim", "context"))
    wide = padded(max(d, e))
    if arch != ARCH or find_spec("triton.experimental.gluon") is None or sizes["itemsize"] != 2 or wide > WIDTHS[-1][0]:
        return []
    m = min(n, max(1024, TOKENS * WIDTH // (h * wide) // 128 * 128))
    return [case(kernel, "causal" if sizes["causal"] else "everything", h=h, g=g, m=m, d=d, e=e)]


def start(kernel: str, case: Case) -> dict[str, Any]:
    """The choice that serves untuned."""
    values: Any = dict(case.key)
    if kernel == "forward":
        from .choices import Key, tiles_by_rule  # noqa: PLC0415

        return tiles_by_rule(Key(**values))._asdict()
    from .backward_choices import Key as BackwardKey  # noqa: PLC0415
    from .backward_choices import by_rule  # noqa: PLC0415

    return by_rule(BackwardKey(**values))._asdict()


def space(kernel: str, case: Case) -> Iterator[Values]:
    """Choices beside the one that serves; what does not fit the machine, its compilation says."""
    untuned, d = start(kernel, case), int(case.key["d"])
    if kernel == "forward":
        keys, groups = ((64, 128), (2, 3)) if d < 256 else ((64,), (2,))
        for w, n, depth, heads in product(groups, keys, (1, 2, 3, 4), (4, 8, 16) if d < 256 else (2, 4, 8, 16, 32)):
            stages = depth * (128 // n) if d == 64 else depth
            registers, loader = (240, 24) if w == 2 else (160, 32)
            # Deeper rings than the machine's shared memory need no compilation to be refused.
            if (w * 64 + 2 * stages * n) * d * 2 <= 232_448 and stages > 1:
                yield {**untuned, "W": w, "N": n, "STAGES": stages, "REGISTERS": registers, "LOADER": loader,
                       "HEADS": heads}  # fmt: skip
        return
    # Not one stage: the next scores are begun before a tile is given back, and would wait for ever.
    width = max(d, int(case.key["e"]))
    rows, depths, shares = ((64, 128), (2, 3, 4), (4, 8, 16)) if width == 64 else ((64,), (2, 3), (2, 4, 8, 16, 32))
    for m, stages, together, stays in product(rows, depths, shares, (False, True) if width <= 128 else (False,)):
        yield {**untuned, "tile_m": m, "stages": stages, "together": together, "persistent": stays}


def related(kernel: str, case: Case) -> list[Case]:
    """Cases of the same key that compile other code."""
    return relatives(case, (FORWARD if kernel == "forward" else BACKWARD)[str(case.variant["mask"])])


def prepare(kernel: str, case: Case, device: str, fill: bool) -> Callable[[], Any]:
    """Launch the forward kernel, or the backward kernels on what it leaves."""
    from .backward import backward  # noqa: PLC0415
    from .backward_choices import chosen  # noqa: PLC0415
    from .forward import forward  # noqa: PLC0415

    q, k, v, d_out = heads_of(case, device, fill)
    plain = call_of(case, q, k.shape[2])
    call = Call(**{one.name: getattr(plain, one.name) for one in fields(plain)})
    if kernel == "forward":
        return lambda: forward(call, q, k, v)
    out, lse = (
        torch.empty_like(d_out, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )
    if fill:
        out, lse = forward(call, q, k, v)
    # dq is summed in no fixed order, and never repeats bit by bit.
    return lambda: backward(call, q, k, v, out, lse, d_out, None, chosen(call, q, k, v))[1:3]


def family(kernel: str) -> Family:
    """Declare one of the kernels."""

    def heuristic(case: Case, arch: str) -> Values:
        del arch
        return start(kernel, case)

    return Family(
        name=f"hopper.{kernel}", operation="attention" if kernel == "forward" else "attention_backward",
        backend="longspan.backends.hopper", sources=SOURCES[f"hopper.{kernel}"],
        cases=lambda arch: cases(kernel, arch), space=lambda case, arch: list(space(kernel, case)),  # noqa: ARG005
        sized=lambda sizes, arch: sized(kernel, sizes, arch), heuristic=heuristic,
        prepare=lambda case, device, fill: prepare(kernel, case, device, fill), cost=neighbourly(heuristic),
        relatives=lambda case, arch: related(kernel, case),  # noqa: ARG005
    )  # fmt: skip


FAMILIES: Final = (family("forward"), family("backward"))
