"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, §3.2.2).

Plane p of a head turns by ``position · inv_freq[p]`` radians, so that a query at i and a key at j
meet at the relative angle ``(i - j) · inv_freq[p]``. A scaling method is another choice of
`inv_freq` (`longspan.spec.scaling`); what it chose is a `Rotation`.
Shapes: b batch, h heads, m tokens, d head dimension, p planes (2p <= d).
"""

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from .checks import check_planes, check_rerotate, check_rotate, floating
from .pairing import Pairing, join, split


@dataclass(frozen=True, eq=False)
class Rotation:
    """How fast every plane of a head turns; a value, made by a scaling method.

    Attributes:
        inv_freq: Radians per token, float64. Leading ``rows`` broadcast over the batch, so that
            sequences of one batch can turn at different speeds (LongRoPE switches by length).
        attention_factor: Multiplies cosine and sine, hence a logit by its square (YaRN's √(1/t), arXiv:2309.00071,
            §3.4).
        softmax_factor: Multiplies the softmax scale instead (DeepSeek's mscale_all_dim); pass
            ``scale = rotation.softmax_factor / math.sqrt(d)`` to `attention`.
        axis: Which of the position axes drives each plane (M-RoPE, arXiv:2409.12191, §2.1); None is axis 0 for all.
    """

    inv_freq: Float64[Tensor, "*rows p"]
    attention_factor: float | Float64[Tensor, "*rows"] = 1.0
    softmax_factor: float = 1.0
    axis: Int64[Tensor, " p"] | None = None

    def to(self, device: torch.device | str) -> "Rotation":
        """Move every tensor of the rotation to a device."""
        factor, axis = self.attention_factor, self.axis
        return replace(
            self,
            inv_freq=self.inv_freq.to(device),
            attention_factor=factor.to(device) if isinstance(factor, Tensor) else factor,
            axis=None if axis is None else axis.to(device),
        )


def inv_freq(d: int, *, base: float = 10_000.0, device: torch.device | str | None = None) -> Float64[Tensor, " p"]:
    """Radians per token of each plane of ``d`` rotated coordinates: ``base^(-2p / d)`` (§3.2.2)."""
    check_planes("inv_freq", d, base=base)
    plane = torch.arange(0, d, 2, dtype=torch.float64, device=device)
    return base ** (-plane / d)


def angle(position: Int[Tensor, "*shape"], rotation: Rotation) -> Float64[Tensor, "..."]:
    """Radians each plane has turned, [m, p] or [b, m, p]: ``position · inv_freq``.

    For speeds up to 1 rad a token a float64 product is exact to 1.2e-7 rad below position 2^31; a float32 one is
    off by 3e-2 at a million.
    """
    if position.ndim == 3:
        planes = rotation.inv_freq.shape[-1]
        axis = (
            torch.zeros(planes, dtype=torch.int64, device=position.device) if rotation.axis is None else rotation.axis
        )
        turned = rearrange(position[axis], "p b m -> b m p")
    else:
        turned = rearrange(position, "... m -> ... m 1")
    return turned.to(torch.float64) * rearrange(rotation.inv_freq, "... p -> ... 1 p")


def rotate(
    x: Float[Tensor, "b h m d"],
    position: Int[Tensor, "*shape"],
    rotation: Rotation,
    *,
    pairing: Pairing = "half",
) -> Float[Tensor, "b h m d"]:
    """Turn every plane of every token: ``x · e^{iθ}``, scaled by the attention factor (eq. 34).

    Args:
        x: Queries or keys. Where 2p < d only the first 2p coordinates turn (partial rotary).
        position: Token positions, below 2^31: ``[m]``, ``[b, m]``, or ``[axes, b, m]`` for M-RoPE.
        rotation: Speed of each plane.
        pairing: Which two coordinates form a plane; a checkpoint's property that configs do not carry.

    Raises:
        ValueError: For shapes that do not fit, a float position, or tensors on different devices.
    """
    check_rotate(x, position, rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing)
    return turn(x, angle(position, rotation), rotation.attention_factor, pairing)


def turn(
    x: Float[Tensor, "b h m d"],
    theta: Float64[Tensor, "..."],
    factor: float | Float64[Tensor, "*rows"],
    pairing: Pairing,
) -> Float[Tensor, "b h m d"]:
    """Turn planes by given angles [m, p] or [b, m, p], and scale them by a factor."""
    turned = 2 * theta.shape[-1]
    theta = rearrange(theta, "... m p -> ... 1 m p")
    if isinstance(factor, Tensor):
        factor = rearrange(factor, "... -> ... 1 1 1")
    cos, sin = (factor * theta.cos()).to(floating(x)), (factor * theta.sin()).to(floating(x))
    real, imag = split(x[..., :turned].to(floating(x)), pairing)
    head = join(real * cos - imag * sin, real * sin + imag * cos, pairing)
    return torch.cat([head.to(x.dtype), x[..., turned:]], dim=-1)


def rotate_qk(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b g m d"],
    position: Int[Tensor, "*shape"],
    rotation: Rotation,
    *,
    pairing: Pairing = "half",
) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b g m d"]]:
    """Turn queries and keys of the same tokens; see `rotate`."""
    return rotate(q, position, rotation, pairing=pairing), rotate(k, position, rotation, pairing=pairing)


def rerotate(
    k: Float[Tensor, "b g n d"],
    position: Int[Tensor, "*shape"],
    old: Rotation,
    new: Rotation,
    *,
    pairing: Pairing = "half",
) -> Float[Tensor, "b g n d"]:
    """Move keys that were cached under one rotation to another, without the layer's input.

    Rotations of one plane commute, so ``R_new = R_(new - old) · R_old`` (needed whenever a
    length-dependent scaling changes its mind: YaRN, arXiv:2309.00071, §3.3).

    Raises:
        ValueError: As `rotate`, for either rotation, and for rotations of different numbers of planes.
    """
    check_rerotate(old.inv_freq, new.inv_freq, old.attention_factor)
    for rotation in (old, new):
        check_rotate(k, position, rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing)
    theta = angle(position, new) - angle(position, old)
    return turn(k, theta, new.attention_factor / old.attention_factor, pairing)


def turns(inv_freq: Float64[Tensor, "*rows p"]) -> Int64[Tensor, "*rows p"]:
    """Speed of each plane in units of 2^-64 turn a token: the integer form that kernels use.

    ``position · turns`` wraps modulo 2^64, that is modulo one full turn, so an integer product has no
    rounding at any position; the high 32 bits, signed, times 2π / 2^32 are the angle in [-π, π).
    """
    fraction = inv_freq / (2 * math.pi)
    fraction = fraction - fraction.round()  # a whole turn a token is no turn; now |fraction| <= 1/2
    # 2^63 itself does not fit; half a turn is its own negative.
    return (fraction * 2.0**64).clamp(min=-(2.0**63), max=2.0**63 - 1024).to(torch.int64)


def angle_of_turns(position: Int[Tensor, "*rows m"], turns: Int64[Tensor, "*rows p"]) -> Float64[Tensor, "*rows m p"]:
    """Radians in [-π, π) after ``position`` tokens, by 64-bit integer arithmetic alone; see `turns`."""
    turned = rearrange(position, "... m -> ... m 1").to(torch.int64) * rearrange(turns, "... p -> ... 1 p")
    return (turned >> 32).to(torch.float64) * (2 * math.pi / 2.0**32)
