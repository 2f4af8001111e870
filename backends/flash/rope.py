# pyright: basic, reportArgumentType=false
"""Rotary embedding of queries and keys in one launch, forward and backward (Su et al. 2021, arXiv:2104.09864).

The gradient of a rotation is the inverse rotation, scaled alike: the same kernel, so derivatives of every order
are right. Only x has a gradient; nothing is saved for it.
Shapes: b batch, h heads, m tokens, d head dimension, p planes (2p <= d).
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from longspan.spec import Rotation
from longspan.spec.checks import check_rotate, refuse
from longspan.spec.pairing import Pairing
from longspan.spec.rope import between
from torch import Tensor
from torch.autograd import forward_ad

from ..registry import Unsupported
from .rope_kernel import INTERPRETED, launch

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
LARGEST: Final = 1024  # coordinates of a head: a row of a tile
PLAIN: Final = (Tensor, torch.nn.Parameter)


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
    serve(declines_rotate(x, position, rotation, pairing=pairing))
    return turned(arguments(x, position, rotation), pairing, x)[0]


def rotate_qk(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys of the same tokens in one launch; see `rotate`."""
    serve(declines_rotate_qk(q, k, position, rotation, pairing=pairing))
    turned_q, turned_k = turned(arguments(q, position, rotation), pairing, q, k)
    return turned_q, turned_k


def rerotate(k: Tensor, position: Tensor, old: Rotation, new: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Move keys that were cached under one rotation to another; see `longspan.spec.rerotate`."""
    return rotate(k, position, between(old, new), pairing=pairing)


def rotate_(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> Tensor:
    """Turn every plane of every token in place and return x; see `rotate`. Has no gradient."""
    serve(declines_rotate_(x, position, rotation, pairing=pairing))
    turn_((x,), *arguments(x, position, rotation), pairing == "interleaved")
    return x


def rotate_qk_(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys in place, in one launch, and return them; see `rotate`. Has no gradient."""
    serve(declines_rotate_qk_(q, k, position, rotation, pairing=pairing))
    turn_((q, k), *arguments(q, position, rotation), pairing == "interleaved")
    return q, k


def serve(reason: str | None) -> None:
    """Raise `Unsupported` where there is a reason to."""
    if reason is not None:
        raise Unsupported(reason)


def declines_rotate(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> str | None:
    """Say why `rotate` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_rotate(x, position, rotation.inv_freq, rotation.attention_factor, rotation.axis, pairing)
    check_rows(x.shape[0], rotation)
    return declines_heads("rotate", x) or declines_rotation("rotate", rotation)


def declines_rotate_qk(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> str | None:
    """Say why `rotate_qk` would raise `Unsupported`, or None; see `declines_rotate`."""
    reason = declines_rotate(q, position, rotation, pairing=pairing) or declines_rotate(
        k, position, rotation, pairing=pairing
    )
    if reason is None and (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        return f"flash.rotate_qk turns one batch of tokens, got q {list(q.shape)} and k {list(k.shape)}; rotate each"
    return reason


def declines_rerotate(
    k: Tensor, position: Tensor, old: Rotation, new: Rotation, *, pairing: Pairing = "half"
) -> str | None:
    """Say why `rerotate` would raise `Unsupported`, or None; see `declines_rotate`."""
    return declines_rotate(k, position, between(old, new), pairing=pairing)


def declines_rotate_(x: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half") -> str | None:
    """Say why `rotate_` would raise `Unsupported`, or None; see `declines_rotate`."""
    return declines_rotate(x, position, rotation, pairing=pairing) or declines_in_place("rotate_", x)


def declines_rotate_qk_(
    q: Tensor, k: Tensor, position: Tensor, rotation: Rotation, *, pairing: Pairing = "half"
) -> str | None:
    """Say why `rotate_qk_` would raise `Unsupported`, or None; see `declines_rotate`."""
    return declines_rotate_qk(q, k, position, rotation, pairing=pairing) or declines_in_place("rotate_qk_", q, k)


def check_rows(b: int, rotation: Rotation) -> None:
    """Refuse attention factors and axes that do not fit the batch and the planes."""
    factor, axis, planes = rotation.attention_factor, rotation.axis, rotation.inv_freq.shape[-1]
    if isinstance(factor, Tensor) and list(factor.shape) not in ([], [1], [b]):
        refuse("rows of attention_factor", f"none, 1 or the batch of {b}", list(factor.shape))
    if axis is not None and list(axis.shape) != [planes]:
        refuse("axis", f"one number per plane, [{planes}]", list(axis.shape))


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
        if x.requires_grad and torch.is_grad_enabled():
            return f"flash.{operation} has no gradient, got a tensor that requires one"
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return f"flash.{operation} cannot write to a tensor expanded over itself, strides {list(x.stride())}"
    return None


def arguments(x: Tensor, position: Tensor, rotation: Rotation) -> tuple[Any, ...]:
    """Flatten a rotation to what the operator takes: (position, inv_freq, factor by row, axis, factor of all)."""
    inv_freq, factor, axis = rotation.inv_freq, rotation.attention_factor, rotation.axis
    if inv_freq.ndim == 2 and inv_freq.shape[0] == 1:
        inv_freq = inv_freq[0]
    if position.ndim == 3 and axis is None:
        position = position[0]
    rows = factor if isinstance(factor, Tensor) else None
    return position, inv_freq, rows, axis if position.ndim == 3 else None, 1.0 if rows is not None else factor


def turned(rotation: tuple[Any, ...], pairing: Pairing, *x: Tensor) -> Sequence[Tensor]:
    """Rotate, through autograd where it could be looking."""
    options = (*rotation, pairing == "interleaved", False)
    return Rotate.apply(*options, *x) if watched(*x) else turn(x, *options)


def watched(*x: Tensor) -> bool:
    """Whether a gradient, a tangent, a transform or a graph may be asked of a call; otherwise a Function only costs.

    It costs more than the launch: binding its arguments, 40 µs. Tensor subclasses (fake ones too) count as watched.
    """
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(one.requires_grad for one in x))
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001 - what Function.apply itself asks
        or forward_ad._current_level >= 0  # noqa: SLF001 - a tangent must be refused, not dropped
        or any(type(one) not in PLAIN for one in x)
    )


class Rotate(torch.autograd.Function):
    """The rotation of any number of tensors (one or two), differentiable in them."""

    @staticmethod
    def forward(
        position: Tensor, inv_freq: Tensor, rows: Tensor | None, axis: Tensor | None, factor: float,
        interleaved: bool, inverse: bool, *x: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Launch, or record the operator where a graph is being captured."""
        return tuple(turn_or_record(x, position, inv_freq, rows, axis, factor, interleaved, inverse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        """Keep the rotation; no heads."""
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:7]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Turn the gradients back."""
        factor, interleaved, inverse = ctx.options
        given = [unit(grad) for grad in grads if grad is not None]
        rotation = (*ctx.saved_tensors, factor, interleaved, not inverse)
        if torch.compiler.is_compiling():  # dynamo cannot trace a Function inside a backward
            turned = iter(turn_or_record(given, *rotation))
        else:
            turned = iter(Rotate.apply(*rotation, *given) if given else ())
        return (*[None] * 7, *[None if grad is None else next(turned) for grad in grads])

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch."""
        size, (position, inv_freq, rows, axis, *options), x = info.batch_size, args[:7], args[7:]
        if dims[3] is not None:
            raise Unsupported("flash.rotate maps over everything but the axis of each plane")
        b = x[0].shape[0] if dims[7] is None else x[0].movedim(dims[7], 0).shape[1]
        leading = 1 if position.ndim - (dims[0] is not None) == 3 else 0  # of [axes, b, m]
        flat = (
            fold(position, dims[0], size, b, leading, batched=position.ndim - (dims[0] is not None) > 1),
            fold(inv_freq, dims[1], size, b, 0, batched=inv_freq.ndim - (dims[1] is not None) > 1),
            None if rows is None else fold(rows, dims[2], size, b, 0, batched=rows.ndim - (dims[2] is not None) > 0),
        )
        heads = [unit(fold(one, dim, size, b, 0, batched=True)) for one, dim in zip(x, dims[7:], strict=True)]
        turned = Rotate.apply(*flat, axis, *options, *heads)
        return tuple(one.unflatten(0, (size, b)) for one in turned), (0,) * len(turned)


def fold(x: Tensor, dim: int | None, size: int, b: int, leading: int, *, batched: bool) -> Tensor:
    """Merge a mapped dimension with the batch dimension at ``leading``, which ``batched`` says exists or not."""
    if dim is None and not (batched and x.shape[leading] > 1):
        return x  # the same for all
    x = x.unsqueeze(leading) if dim is None else x.movedim(dim, leading)
    x = x if batched else x.unsqueeze(leading + 1)
    return x.expand(*x.shape[:leading], size, b, *x.shape[leading + 2 :]).flatten(leading, leading + 1)


def unit(x: Tensor) -> Tensor:
    """Give a gradient (an expanded one has stride 0) or a mapped tensor the unit last stride that kernels read."""
    return x if x.stride(-1) == 1 else x.contiguous()


torch.library.define(
    "longspan::flash_rotate",
    "(Tensor[] x, Tensor position, Tensor inv_freq, Tensor? rows, Tensor? axis, float factor, bool interleaved,"
    " bool inverse) -> Tensor[]",
)
torch.library.define(
    "longspan::flash_rotate_",
    "(Tensor(a!)[] x, Tensor position, Tensor inv_freq, Tensor? rows, Tensor? axis, float factor, bool interleaved)"
    " -> ()",
)


@torch.library.register_fake("longspan::flash_rotate")
def _(x: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(one) for one in x]


@torch.library.register_fake("longspan::flash_rotate_")
def _(x: list[Tensor], *_: Any) -> None:
    pass


def turn(
    x: Sequence[Tensor], position: Tensor, inv_freq: Tensor, rows: Tensor | None, axis: Tensor | None, factor: float,
    interleaved: bool, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    """Rotate out of place: the layout of each output is its input's."""
    out = [torch.empty_like(one) for one in x]
    launch(x, out, position, inv_freq, rows, axis, factor, interleaved, inverse)
    return out


def turn_or_record(x: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Rotate out of place, through the operator where a graph is being captured."""
    if torch.compiler.is_compiling() or type(x[0]) not in PLAIN:
        return torch.ops.longspan.flash_rotate(list(x), *rest)
    return turn(x, *rest)


def turn_raw_(
    x: Sequence[Tensor], position: Tensor, inv_freq: Tensor, rows: Tensor | None, axis: Tensor | None, factor: float,
    interleaved: bool,
) -> None:  # fmt: skip
    """Rotate in place."""
    launch(x, x, position, inv_freq, rows, axis, factor, interleaved, False)


def turn_(x: Sequence[Tensor], *rest: Any) -> None:
    """Rotate in place, through the operator where a graph is being captured."""
    if torch.compiler.is_compiling() or type(x[0]) not in PLAIN:
        torch.ops.longspan.flash_rotate_(list(x), *rest)
    else:
        turn_raw_(x, *rest)


torch.library.impl("longspan::flash_rotate", ("cuda", "cpu"), turn)
torch.library.impl("longspan::flash_rotate_", ("cuda", "cpu"), turn_raw_)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    """Keep the rotation of the operator."""
    ctx.save_for_backward(*inputs[1:5])
    ctx.options = inputs[5:]


def turn_back(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Turn the gradients of the operator back."""
    factor, interleaved, inverse = ctx.options
    given = [unit(grad) for grad in grads]
    return (
        torch.ops.longspan.flash_rotate(given, *ctx.saved_tensors, factor, interleaved, not inverse), *[None] * 7
    )


# Where a transform looks through `Rotate` (torch.func.grad inside torch.compile), the operator must not lose gradients.
torch.library.register_autograd("longspan::flash_rotate", turn_back, setup_context=keep)
