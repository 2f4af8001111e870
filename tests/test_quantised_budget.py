"""The budget of attention to quantised heads: it accepts a kernel's arithmetic, and rejects its plausible bugs."""

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch import Tensor

from longspan.laws import worst
from longspan.laws.quantised import quantised_bounds
from longspan.spec import AttentionState, Quantised, bounds, masks, quantise, visible

OFFSET: Final = 2.0**8
TILE: Final = 128


class Problem(NamedTuple):
    """Quantised heads under a mask."""

    q: Quantised
    k: Quantised
    v: Quantised
    mask: masks.Mask
    scale: float


def problem(
    seed: int, m: int, n: int, *, d: int = 64, mean: float = 0.0, amplitude: float = 1.0, mask: str = "everything()",
    scale: float | None = None,
) -> Problem:  # fmt: skip
    """Draw a problem: one sequence of four query heads on two key heads, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 30.0, 0.01, 3.0])[None, :, None, None]
    q, k, v = (torch.randn(1, h, t, d, generator=generator) * sizes[:, :h] for h, t in ((4, m), (2, n), (2, n)))
    # Scores of one spread in all heads: what sizes multiply, the other side divides.
    k = k / sizes[:, :2] ** 2
    q = q / sizes * sizes[:, [0, 0, 1, 1]]
    seen: Any = eval(mask, {**vars(masks)})  # noqa: S307 - our own source
    return Problem(
        quantise(q * amplitude), quantise(k), quantise(v + mean * sizes[:, :2]), seen, scale or 1 / math.sqrt(d)
    )


def flash(
    of: Problem,
    *,
    weigh: Callable[[Tensor], Tensor] = lambda p: (p * OFFSET).to(torch.float8_e4m3fn).float() / OFFSET,
    rescale: Callable[[Tensor], Tensor] = lambda keep: keep,
    order: Callable[[Tensor], Tensor] = lambda v: v,
    factor: Callable[[Tensor, Tensor], Tensor] = lambda q, k: q * k,
    weight_of_values: Callable[[Tensor], Tensor] = lambda v: v,
    unit: float = 0.0,
) -> AttentionState:
    """Attention to quantised heads as a kernel computes it, last tile first, weights in e4m3; options plant bugs."""
    q, k, v = (x.values.float() for x in of[:3])
    k, v, k_scale, v_scale = (x.repeat_interleave(2, 1) for x in (k, v, of.k.scale, of.v.scale))
    m, n = q.shape[2], k.shape[2]
    by = factor(of.q.scale, k_scale)[..., None] * of.scale
    hidden = ~visible(bounds(of.mask, 1, m, n), n)[0]
    peak = torch.full((*q.shape[:3], 1), -torch.inf)
    total, acc = torch.zeros_like(peak), torch.zeros(*q.shape[:3], v.shape[-1])
    for start in reversed(range(0, n, TILE)):
        keys = slice(start, start + TILE)
        score = (by * (q @ k[:, :, keys].mT)).masked_fill(hidden[:, keys], -torch.inf)
        above = torch.maximum(peak, score.amax(-1, keepdim=True))
        finite = above.masked_fill(above == -torch.inf, 0.0)
        p, keep = (score - finite).exp(), (peak - finite).exp()
        total, peak = keep * total + p.sum(-1, keepdim=True), above
        acc = rescale(keep) * acc + weigh(p) @ order(v[:, :, keys])
    inverse = torch.where(total == 0, 0.0, 1 / total)
    out = acc * inverse * weight_of_values(v_scale)[..., None]
    return AttentionState(out.to(torch.bfloat16), (peak + total.log() + unit).squeeze(-1))


HARD: Final[dict[str, dict[str, Any]]] = {
    "one key": {"m": 1, "n": 1},
    "causal": {"m": 150, "n": 300, "mask": "causal()"},
    "many": {"m": 60, "n": 1000},
    "window": {"m": 150, "n": 300, "mask": "causal() & window(40)"},
    "blind rows": {"m": 200, "n": 100, "mask": "causal()"},
    "values of mean 3": {"m": 40, "n": 2000, "mean": 3.0},
    "sharp": {"m": 40, "n": 1000, "amplitude": 10.0},
    "flat": {"m": 40, "n": 1000, "amplitude": 0.01},
    "no logits at all": {"m": 20, "n": 1000, "scale": 1e-9},
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("seed", range(4))
def test_correct_arithmetic_is_accepted(case: str, seed: int) -> None:
    of = problem(seed, **HARD[case])
    bound = quantised_bounds(of.q, of.k, of.v, mask=of.mask, scale=of.scale)
    state = flash(of)
    assert 0 <= max(worst("out", state.out, bound["out"]), worst("lse", state.lse, bound["lse"])) <= 1


def permuted(v: Tensor) -> Tensor:
    """Values of every 16 keys in the order of places."""
    whole = v.shape[2] // 16 * 16
    first = v[:, :, :whole].unflatten(2, (-1, 2, 4, 2)).transpose(3, 4).flatten(2, 5)
    return torch.cat([first, v[:, :, whole:]], 2)


BUGS: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "no offset": ({"weigh": lambda p: p.to(torch.float8_e4m3fn).float()}, "peaked", "out"),
    "offset not taken back": ({"weigh": lambda p: (p * OFFSET).to(torch.float8_e4m3fn).float()}, "causal", "out"),
    "offset left in the sum": ({"unit": 8 * math.log(2)}, "causal", "lse"),
    "weights in e5m2": ({"weigh": lambda p: (p * OFFSET).to(torch.float8_e5m2).float() / OFFSET}, "window", "out"),
    "never rescaled": ({"rescale": torch.ones_like}, "causal", "out"),
    "values in another order": ({"order": permuted}, "causal", "out"),
    "scale of queries forgotten": ({"factor": lambda _, k: k}, "causal", "lse"),
    "scale of keys forgotten": ({"factor": lambda q, _: q}, "causal", "lse"),
    "scale of values forgotten": ({"weight_of_values": torch.ones_like}, "causal", "out"),
    "scales of the next head": ({"factor": lambda q, k: q.roll(1, 1) * k}, "causal", "lse"),
    "keys' scales not shared by the group": ({"factor": lambda q, k: q * k[:, [0, 2, 1, 3]]}, "causal", "lse"),
    "a tile dropped": ({"order": lambda v: v * (v.shape[2] == TILE)}, "causal", "out"),
}
PEAKED: Final = {"m": 20, "n": 2000, "amplitude": 3.0, "mean": 3.0}


@pytest.mark.parametrize("bug", BUGS)
def test_a_plausible_bug_is_rejected(bug: str) -> None:
    options, case, name = BUGS[bug]
    of = problem(0, **{**HARD, "peaked": PEAKED}[case])
    bound = quantised_bounds(of.q, of.k, of.v, mask=of.mask, scale=of.scale)
    correct, wrong = flash(of), flash(of, **options)
    assert worst(name, getattr(correct, name), bound[name]) <= 1
    with pytest.raises(AssertionError, match=f"{name} exceeds budget"):
        worst(name, getattr(wrong, name), bound[name])
