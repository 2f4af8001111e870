"""What several scaling methods share: a ramp, a spread, a temperature (Peng et al. 2023, arXiv:2309.00071).

Shapes: p planes; leading rows are sequences of a batch.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from .checks import refuse


def turns_over(trained: Float64[Tensor, " p"], original: int) -> Float64[Tensor, " p"]:
    """Full turns of each plane over ``original`` tokens: the paper's r = L / λ."""
    return original * trained / (2 * math.pi)


def ramp(x: Float64[Tensor, " p"], low: float, high: float) -> Float64[Tensor, " p"]:
    """0 up to ``low``, 1 from ``high`` on, linear in between; a step where the two meet."""
    if low == high:
        return (x > low).to(x.dtype)
    return ((x - low) / (high - low)).clamp(0, 1)


def blend(trained: Float64[Tensor, " p"], factor: float, keep: Float64[Tensor, " p"]) -> Float64[Tensor, " p"]:
    """Trained speed where ``keep`` is 1, ``factor`` times slower where it is 0."""
    return keep * trained + (1 - keep) * trained / factor


def spread(trained: Float64[Tensor, " p"], factor: float | Float64[Tensor, "*rows 1"]) -> Float64[Tensor, "*rows p"]:
    """Slow plane i down ``factor^(2i / (d - 2))`` times: the first not at all, the last by ``factor``.

    This is ``(base · factor^(d / (d - 2)))^(-2i / d)``, the same written as a change of base.
    """
    plane = torch.arange(trained.shape[-1], dtype=torch.float64, device=trained.device)
    return trained * factor ** (-plane / (trained.shape[-1] - 1))


def temperature(factor: float, mscale: float = 1.0) -> float:
    """√(1/t): ``0.1 · mscale · ln(factor) + 1`` (`mscale` is DeepSeek's), and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def check_ramp(method: str, **ends: float) -> None:
    """Refuse a ramp whose first end is not below its second."""
    (low, start), (high, stop) = ends.items()
    if start >= stop:
        refuse(f"{method}: {low}", f"below {high}, {stop}", start)
