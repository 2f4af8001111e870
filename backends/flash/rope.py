"""Rotary embedding of queries and keys in one launch, forward and backward (Su et al. 2021, arXiv:2104.09864).

What is served, and what is declined by name; the derivatives are in `rope_function`, the kernel in `rope_kernel`.
Shapes: b batch, h heads, m tokens, d head dimension, p planes (2p <= d).
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from longspan.spec import Rotation
from longspan.spec.checks import check_rerotate, check_rotate
from longspan.spec.pairing import Pairing

from ..registry import serve
from .kin import Sightings
from .plan import Bound, layout, memory, recall, remember
from .rope_function import transformed, turn_, turn_out, turned, watched
from .rope_kernel import INTERPRETED, on

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
REPEATED: Final[dict[Any, "Repeated"]] = memory()  # what `asked` returns, to how it was launched
SEEN: Final = Sightings()
LARGEST: Final = 1024  # coordinates of a head: a row of a tile


def rotate(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Turn every plane of every token; see `longspan.spec.rotate`.

    Args:
        x: ``[b, h, m, d]`` in fp16, bf16 or fp32, any strides with a unit last one; not copied.
        position: ``[m]``, ``[b, m]`` or ``[axes, b, m]``.
        rotation: Speed of each plane; its rows may differ by sequence.
        pairing: ``"half"`` or ``"interleaved"``.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_rotate` names.
    """
    key = asked(position, rotation, pairing, x)
    if key is not None and (again := recall(REPEATED, key)) is not None:
        with on(x.device):
            results = again(position, rotation, x)
        if results is not None:
            return results[0]
    serve(declines_rotate(x, position, rotation, pairing=pairing))
    return turned_as(key, arguments(position, rotation), pairing, x)[0]


def rotate_qk(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys of the same tokens in one launch; see `rotate`."""
    key = asked(position, rotation, pairing, q, k)
    if key is not None and (again := recall(REPEATED, key)) is not None:
        with on(q.device):
            results = again(position, rotation, q, k)
        if results is not None:
            return results[0], results[1]
    serve(declines_rotate_qk(q, k, position, rotation, pairing=pairing))
    turned_q, turned_k = turned_as(key, arguments(position, rotation), pairing, q, k)
    return turned_q, turned_k


def asked(position: Tensor, rotation: Rotation, pairing: Pairing, *x: Tensor) -> tuple[Hashable, ...] | None:
    """All of a call but the contents and addresses of its tensors: what its checks read, and what is launched.

    None if autograd, a transform or a compiler watches.
    """
    inv_freq, factor, axis = rotation.inv_freq, rotation.attention_factor, rotation.axis
    rows, axes = isinstance(factor, Tensor), axis is not None
    if watched(*x, position, inv_freq) or (rows and watched(factor)) or (axes and watched(axis)):
        return None
    return (
        pairing, layout(position), layout(inv_freq), layout(factor) if rows else factor,
        layout(axis) if axes else None, *map(layout, x),
    )  # fmt: skip


class Repeated(NamedTuple):
    """A launch of the rotation, to be repeated on other tensors of the same layouts."""

    bound: Bound
    rows: bool
    axes: bool

    def __call__(self, position: Tensor, rotation: Rotation, *x: Tensor) -> list[Tensor] | None:
        """Turn into new results, or return None where the launch cannot be repeated on these."""
        out = [torch.empty_like(one) for one in x]
        rows: Any = rotation.attention_factor if self.rows else None
        axis: Any = rotation.axis if self.axes else None
        launched = self.bound(
            x[0].data_ptr(), out[0].data_ptr(), x[-1].data_ptr(), out[-1].data_ptr(),
            position.data_ptr(), rotation.inv_freq.data_ptr(),
            0 if rows is None else rows.data_ptr(), 0 if axis is None else axis.data_ptr(),
        )  # fmt: skip
        return out if launched else None


def turned_as(key: Hashable, rotation: tuple[Any, ...], pairing: Pairing, *x: Tensor) -> Sequence[Tensor]:
    """Rotate, and keep under a key, unless that is None, how it is done again."""
    if key is None:
        return turned(rotation, pairing, *x)
    out, bound = turn_out(x, *rotation, pairing == "interleaved", False)
    _, inv_freq, rows, axis, _ = rotation
    if bound is not None and inv_freq.stride(-1) == 1 and SEEN.again(key):  # else a copy of it was read
        remember(REPEATED, key, Repeated(bound, rows is not None, axis is not None))
    return out


def rerotate(k: Tensor, position: Tensor, old: Rotation, new: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Move keys that were cached under one rotation to another, in one launch; see `longspan.spec.rerotate`."""
    serve(declines_rerotate(k, position, old, new, pairing=pairing))
    return rotate(k, position, between(old, new), pairing=pairing)


def between(old: Rotation, new: Rotation) -> Rotation:
    """Speak ``new · old⁻¹`` of rotations on the same axes: angles subtract, and so do speeds."""
    factor = new.attention_factor / old.attention_factor
    return replace(new, inv_freq=new.inv_freq - old.inv_freq, attention_factor=factor)


def rotate_(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Turn every plane of every token in place and return x; see `rotate`. Has no gradient."""
    serve(declines_rotate_(x, position, rotation, pairing=pairing))
    turn_((x,), *arguments(position, rotation), pairing == "interleaved")
    return x


def rotate_qk_(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys in place, in one launch, and return them; see `rotate`. Has no gradient."""
    serve(declines_rotate_qk_(q, k, position, rotation, pairing=pairing))
    turn_((q, k), *arguments(position, rotation), pairing == "interleaved")
    return q, k


def declines_rotate(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> str | None:
    """Say why `rotate` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_rotate(x, position, rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing)
    return declines_heads("rotate", x) or declines_rotation("rotate", rotation)


def declines_rotate_qk(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> str | None:
    """Say why `rotate_qk` would raise `Unsupported`, or None; see `declines_rotate`."""
    reason = declines_rotate(q, position, rotation, pairing=pairing)
    check_rotate(k, position, rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing)
    reason = reason or declines_heads("rotate_qk", k)
    if reason is None and (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        return f"flash.rotate_qk turns one batch of tokens, got q {list(q.shape)} and k {list(k.shape)}; rotate each"
    return reason


def declines_rerotate(
    k: Tensor, position: Tensor, old: Rotation, new: Rotation, *, pairing: Pairing = "half"
) -> str | None:
    """Say why `rerotate` would raise `Unsupported`, or None; see `declines_rotate`."""
    check_rerotate(old.inv_freq, new.inv_freq, old.attention_factor)
    for rotation in (old, new):
        check_rotate(k, position, rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing)
    if old.axis is not new.axis:
        return "flash.rerotate serves rotations that share one axis tensor: speeds subtract only on the same axes"
    return declines_rotate(k, position, between(old, new), pairing=pairing)


def declines_rotate_(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> str | None:
    """Say why `rotate_` would raise `Unsupported`, or None; see `declines_rotate`."""
    return declines_rotate(x, position, rotation, pairing=pairing) or declines_in_place("rotate_", x)


def declines_rotate_qk_(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> str | None:
    """Say why `rotate_qk_` would raise `Unsupported`, or None; see `declines_rotate`."""
    return declines_rotate_qk(q, k, position, rotation, pairing=pairing) or declines_in_place("rotate_qk_", q, k)


def declines_heads(operation: str, *heads: Tensor) -> str | None:
    """Say which tensor of heads the kernels cannot read, and why."""
    for x in heads:
        if x.dtype not in DTYPES:
            return f"flash.{operation} computes in float32 and serves fp16, bf16 and fp32, got {x.dtype}"
        if x.shape[-1] > LARGEST:
            return f"flash.{operation} serves heads of at most {LARGEST} coordinates, got {x.shape[-1]}"
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"flash.{operation} reads heads whose last stride is 1, got strides {list(x.stride())}"
        if not INTERPRETED and x.device.type != "cuda":
            return f"flash.{operation} runs on a GPU, or on a CPU under TRITON_INTERPRET=1, got a tensor on {x.device}"
    return None


def declines_rotation(operation: str, rotation: Rotation) -> str | None:
    """Say which gradient of the rotation itself would be lost."""
    for name, x in (("inv_freq", rotation.inv_freq), ("attention_factor", rotation.attention_factor)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            return f"flash.{operation} has no gradient for {name}, which requires one"
    return None


def declines_in_place(operation: str, *heads: Tensor) -> str | None:
    """Say why heads cannot be overwritten."""
    for x in heads:
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return f"flash.{operation} cannot write to a tensor expanded over itself, strides {list(x.stride())}"
    return declines_derivative(operation, *heads)


def declines_derivative(operation: str, *heads: Tensor) -> str | None:
    """Say which derivative an operation in place would lose."""
    if any(x.requires_grad for x in heads) and torch.is_grad_enabled():
        return f"flash.{operation} has no gradient, got a tensor that requires one"
    if transformed():
        return f"flash.{operation} writes in place: torch.func and forward-mode differentiation cannot look through it"
    return None


def arguments(position: Tensor, rotation: Rotation) -> tuple[Any, ...]:
    """Flatten a rotation to what the operator takes: (position, inv_freq, factor by row, axis, factor of all)."""
    inv_freq, factor, axis = rotation.inv_freq, rotation.attention_factor, rotation.axis
    if inv_freq.ndim == 2 and inv_freq.shape[0] == 1:
        inv_freq = inv_freq[0]
    if position.ndim == 3 and axis is None:
        position = position[0]
    rows = factor if isinstance(factor, Tensor) else None
    return position, inv_freq, rows, axis if position.ndim == 3 else None, 1.0 if rows is not None else factor
