"""LongRoPE (Ding et al. 2024, arXiv:2402.13753), as Phi-3 and MiniCPM publish it.

Every plane has a divisor of its own, found by search, in two sets: one for sequences up to the
trained length, one for longer ones. Each sequence of a batch switches by its own length.
Shapes: b sequences, p planes.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from ..checks import check_planes, refuse, same_device
from ..rope import Rotation, inv_freq


def longrope(
    d: int,
    *,
    base: float = 10_000.0,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original: int,
    length: int | Int[Tensor, " b"],
    factor: float = 1.0,
    attention_factor: float | None = None,
    short_mscale: float | None = None,
    long_mscale: float | None = None,
    device: torch.device | str | None = None,
) -> Rotation:
    """Divide each plane's speed by its long factor where ``length > original``, else by its short one.

    Args:
        d: Rotated coordinates of a head.
        base: RoPE base θ.
        short_factor: Divisor of each of the d / 2 planes up to the trained length.
        long_factor: Divisor of each plane beyond it.
        original: Trained context length, in tokens.
        length: Tokens of the sequence, or of each sequence of a batch; then `inv_freq` is [b, p].
        factor: How many times longer than trained the context becomes; it only sets the attention factor,
            ``√(1 + ln(factor) / ln(original))``.
        attention_factor: Overrides that formula.
        short_mscale: Overrides it up to the trained length (Phi-3.5-MoE).
        long_mscale: Overrides it beyond.
        device: Where the rotation lives.
    """
    check_planes("longrope", d, base=base, original=original, factor=factor)
    if original < 2:
        refuse("longrope: original, the trained context,", "at least 2 tokens", original)
    for name, divisors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(divisors) != d // 2 or not all(math.isfinite(x) and x > 0 for x in divisors):
            refuse(f"longrope: {name}", f"{d // 2} finite numbers above 0, one for each plane", describe(divisors))
    if attention_factor is not None and not math.isfinite(attention_factor):
        refuse("longrope: attention_factor", "finite", attention_factor)
    if attention_factor is not None and (short_mscale is not None or long_mscale is not None):
        refuse("longrope: attention_factor", "given without short_mscale and long_mscale", "both")
    trained = inv_freq(d, base=base, device=device)
    short, long = (trained / torch.tensor(f, dtype=torch.float64, device=device) for f in (short_factor, long_factor))
    plain = magnitude(factor, original) if attention_factor is None else attention_factor
    weak, strong = (plain if mscale is None else mscale for mscale in (short_mscale, long_mscale))
    if isinstance(length, Tensor):
        same_device(length=length, inv_freq=trained)
        return by_row(length > original, short, long, weak, strong)
    if length < 0:
        refuse("longrope: length", "at least 0", length)
    return Rotation(long, strong) if length > original else Rotation(short, weak)


def by_row(stretched: Bool[Tensor, " b"], short: Tensor, long: Tensor, weak: float, strong: float) -> Rotation:
    """Choose the long speeds and factor for the rows that are stretched, the short ones for the others."""
    chosen = torch.where(rearrange(stretched, "b -> b 1"), long, short)
    if weak == strong:
        return Rotation(chosen, weak)
    factors = torch.where(stretched, torch.full_like(chosen[:, 0], strong), torch.full_like(chosen[:, 0], weak))
    return Rotation(chosen, factors)


def magnitude(factor: float, original: int) -> float:
    """``√(1 + ln(factor) / ln(original))``, and 1 where nothing is stretched (Phi-3's code; it is not in the paper)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def describe(divisors: Sequence[float]) -> str:
    """Say how many divisors there are, and the first that is none."""
    wrong = [x for x in divisors if not (math.isfinite(x) and x > 0)]
    return f"{len(divisors)} numbers" + (f", one of them {wrong[0]}" if wrong else "")
