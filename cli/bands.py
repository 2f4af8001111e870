"""What a rotation does to each frequency band, against the trained and the target context.

A plane's wavelength is 2π / inv_freq tokens. As in YaRN (arXiv:2309.00071, §3.2), bands are told apart by how
often a plane turned over the trained context: above 32 times (high: tells neighbours apart), fewer than once
(low: never came round, so that longer contexts show it new angles), and in between.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor

from longspan.spec import inv_freq

from .config import Plan

FAST: Final = 32.0  # turns over the trained context above which a plane is of the high band
SLOW: Final = 1.0  # and below which it is of the low one
BANDS: Final = ("high", "mid", "low")
SAME: Final = 1e-6  # relative difference of two speeds that are alike


def describe_rotation(plan: Plan, context: int, trained: int) -> dict[str, Any] | None:
    """Say what a layer's rotation does; None where it has none."""
    rotation, rope = plan.rotation, plan.rope
    if rotation is None or rope is None:
        return None
    speed = rotation.inv_freq.cpu()
    plain = inv_freq(2 * speed.shape[-1], base=rope.base)
    turned = trained * plain / (2 * math.pi)
    member = {"high": turned > FAST, "mid": (turned <= FAST) & (turned >= SLOW), "low": turned < SLOW}
    # Planes that never came round in training, and reach angles now that they did not reach then.
    unseen = member["low"] & (speed * context > plain * trained * (1 + SAME))
    beyond = float((speed * context / (plain * trained))[unseen].max()) if bool(unseen.any()) else None
    return {
        "type": rope.kind,
        "base": rope.base,
        "planes": speed.shape[-1],
        "attention_factor": float(rotation.attention_factor),
        "softmax_factor": float(rotation.softmax_factor),
        "bands": {name: band(plain[member[name]], speed[member[name]]) for name in BANDS},
        "unseen_planes": int(unseen.sum()),
        "unseen_reach": beyond,
        "wavelengths": {"trained": waves(plain), "now": waves(speed)},
    }


def band(plain: Tensor, speed: Tensor) -> dict[str, Any]:
    """Say how much slower the planes of one band turn than they were trained to."""
    if not plain.numel():
        return {"planes": 0, "effect": "no planes", "factor": None, "wavelength": None}
    slower = plain / speed  # infinite for a plane that stands still
    low, high = float(slower.min()), float(slower.max())
    length = [wave for wave in waves(plain) if wave is not None]
    return {
        "planes": plain.numel(),
        "effect": effect(low, high),
        "factor": [low, high if math.isfinite(high) else None],
        "wavelength": [min(length), max(length)],
    }


def effect(low: float, high: float) -> str:
    """Name what happened to a band whose planes turn ``low`` to ``high`` times slower."""
    if not math.isfinite(high):
        return "stands still" if not math.isfinite(low) else f"partly stands still, the rest ÷ {low:.3g} and more"
    if abs(high - low) <= SAME * high:
        return "unchanged" if abs(low - 1) <= SAME else f"interpolated ÷ {low:.4g}"
    return f"blended ÷ {low:.3g} to {high:.3g}"


def waves(speed: Tensor) -> list[float | None]:
    """Wavelength of every plane, in tokens; None for one that stands still."""
    return [2 * math.pi / value if value > 0 else None for value in torch.atleast_1d(speed).tolist()]
