"""Rotation and appending, wrong in one way each; see `longspan.laws.mutants`."""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longspan.backends import eager
from longspan.spec import Rotation, rerotate, rotate, rotate_qk
from longspan.spec.pairing import Pairing, join, split

from .mutant_sizes import hook


def factor_of(rotation: Rotation) -> float | Tensor:
    """Return the attention factor, laid out to multiply heads if there is one per sequence."""
    factor = rotation.attention_factor
    return rearrange(factor, "... -> ... 1 1 1") if isinstance(factor, Tensor) else factor


def attention_factor_missing(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Turn without scaling."""
    return rotate(x, position, replace(rotation, attention_factor=1.0), **options)


def angles_in_float32(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Multiply positions and speeds in float32, and reduce afterwards."""
    if position.ndim == 3:
        return rotate(x, position, rotation, **options)
    theta = rearrange(position.float(), "... m -> ... m 1") * rearrange(rotation.inv_freq.float(), "... p -> ... 1 p")
    return turned_by(x, theta.double(), rotation, **options)


def positions_rounded_to_float16(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Keep positions in the dtype of the heads."""
    return rotate(x, position.clamp(max=60_000).half().long(), rotation, **options)


def turned_by(x: Tensor, theta: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Turn by given angles."""
    planes = rotation.inv_freq.shape[-1]
    real, imag = split(x[..., : 2 * planes].double(), pairing)
    theta = rearrange(theta, "... m p -> ... 1 m p")
    cos, sin = (factor_of(rotation) * part for part in (theta.cos(), theta.sin()))
    head = join(real * cos - imag * sin, real * sin + imag * cos, pairing)
    return torch.cat([head.to(x.dtype), x[..., 2 * planes :]], -1)


def other_pairing(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Pair neighbours where halves were asked for, and the other way round."""
    return rotate(x, position, rotation, pairing="interleaved" if pairing == "half" else "half")


def turned_backwards(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Turn the other way."""
    return rotate(x, position, replace(rotation, inv_freq=-rotation.inv_freq), **options)


def tail_scaled(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Scale the tail, which does not turn, by the attention factor."""
    turned, planes = rotate(x, position, rotation, **options), rotation.inv_freq.shape[-1]
    return torch.cat([turned[..., : 2 * planes], (factor_of(rotation) * turned[..., 2 * planes :]).to(x.dtype)], -1)


def planes_paired_across_the_head(
    x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> Tensor:
    """Pair a partial rotary's coordinates with those half a head away."""
    planes, half = rotation.inv_freq.shape[-1], x.shape[-1] // 2
    if pairing != "half" or planes == half:
        return rotate(x, position, rotation, pairing=pairing)
    order = [*range(planes), *range(half, half + planes), *range(planes, half), *range(half + planes, 2 * half)]
    turned = rotate(x[..., order], position, rotation, pairing="half")
    return turned[..., torch.tensor(order).argsort()]


def one_axis_for_all(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Read every plane's position from the first axis."""
    return rotate(x, position, replace(rotation, axis=None), **options)


def one_speed_for_the_batch(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Turn every sequence at the speed of the first."""
    first = rotation.inv_freq if rotation.inv_freq.ndim == 1 else rotation.inv_freq[0]
    return rotate(x, position, replace(rotation, inv_freq=first.expand_as(rotation.inv_freq)), **options)


def one_factor_for_the_batch(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Scale every sequence by the attention factor of the first."""
    factor = rotation.attention_factor
    factor = float(factor.flatten()[0]) if isinstance(factor, Tensor) else factor
    return rotate(x, position, replace(rotation, attention_factor=factor), **options)


def int32_positions_misread(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Read positions as 64-bit numbers, whatever they are."""
    return rotate(x, position // 2 if position.dtype == torch.int32 else position, rotation, **options)


def tokens_past_192_not_turned(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Launch a grid that is too short for a long prompt."""
    return torch.cat([rotate(x, position, rotation, **options)[:, :, :192], x[:, :, 192:]], 2)


def heads_past_10_not_turned(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Turn the heads of one block."""
    return torch.cat([rotate(x, position, rotation, **options)[:, :10], x[:, 10:]], 1)


def heads_turned_in_place(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Write the turned heads over those that were given."""
    turned = rotate(x, position, rotation, **options)
    with torch.no_grad():
        x.detach()[:1].copy_(turned[:1])
    return turned


def turned_heads_are_float64(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Leave the result in the dtype of the angles."""
    return rotate(x, position, rotation, **options).double()


class Forward(torch.autograd.Function):
    """A rotation whose gradient turns forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, rotation: Rotation, options: dict[str, Any]) -> Tensor:
        """Turn as asked."""
        ctx.rest = (position, rotation, options)
        return rotate(x, position, rotation, **options)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        """Turn on instead of back."""
        position, rotation, options = ctx.rest
        return rotate(d_x, position, rotation, **options), None, None, None


def gradient_turned_forward(x: Tensor, position: Tensor, rotation: Rotation, **options: Any) -> Tensor:
    """Turn the gradient forward again, and not back."""
    return Forward.apply(x, position, rotation, options)


def keys_not_turned(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, **options: Any
) -> tuple[Tensor, Tensor]:
    """Turn the queries alone."""
    return rotate(q, position, rotation, **options), k


def pair_is_float64(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, **options: Any
) -> tuple[Tensor, Tensor]:
    """Leave queries and keys in the dtype of the angles."""
    turned = rotate_qk(q, k, position, rotation, **options)
    return turned[0].double(), turned[1].double()


def gradient_of_turned_keys_lost(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, **options: Any
) -> tuple[Tensor, Tensor]:
    """Pass back the gradient of the queries alone."""
    turned = rotate_qk(q, k, position, rotation, **options)
    return turned[0], hook(turned[1], torch.zeros_like)


def gradient_of_moved_keys_lost(k: Tensor, position: Tensor, old: Rotation, new: Rotation, **options: Any) -> Tensor:
    """Move keys as a constant."""
    return rerotate(k.detach(), position, old, new, **options)


def moved_keys_are_float64(k: Tensor, position: Tensor, old: Rotation, new: Rotation, **options: Any) -> Tensor:
    """Leave moved keys in the dtype of the angles."""
    return rerotate(k, position, old, new, **options).double()


def moved_without_the_old(k: Tensor, position: Tensor, old: Rotation, new: Rotation, **options: Any) -> Tensor:
    """Turn cached keys by the new rotation on top of the old one."""
    del old
    return rotate(k, position, new, **options)


def moved_without_the_factor(k: Tensor, position: Tensor, old: Rotation, new: Rotation, **options: Any) -> Tensor:
    """Move the angles of cached keys, and leave the old attention factor on them."""
    return rotate(k, position, Rotation(new.inv_freq - old.inv_freq, axis=new.axis), **options)


def skipped_tokens_written(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, **options: Any
) -> None:
    """Take slot -1 for the last slot."""
    slots = k_cache.shape[0] * k_cache.shape[2]
    eager.append_(k, v, k_cache, v_cache, slot % slots, **options)


def appended_keys_not_turned(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, **options: Any
) -> None:
    """Write new keys as they come."""
    del options
    eager.append_(k, v, k_cache, v_cache, slot)
