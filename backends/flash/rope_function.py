# pyright: basic, reportCallIssue=false
"""How rotation enters autograd, `torch.func` and `torch.compile`: a Function outside, an operator in captured graphs.

Only x has a gradient, and none is saved for it: the inverse rotation, scaled alike, is the same kernel. So
derivatives of every order are right.
Shapes: b batch, h heads, m tokens, d head dimension, p planes (2p <= d).
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longspan.spec.pairing import Pairing

from ..registry import Unsupported
from .plan import Bound
from .rope_kernel import launch

PLAIN: Final = (Tensor, torch.nn.Parameter)


def turned(rotation: tuple[Any, ...], pairing: Pairing, *x: Tensor) -> Sequence[Tensor]:
    """Rotate, through autograd where it could be looking."""
    options = (*rotation, pairing == "interleaved", False)
    return Rotate.apply(*options, *x) if watched(*x) else turn(x, *options)


def watched(*x: Tensor) -> bool:
    """Whether a gradient, a tangent, a transform or a graph may be asked of a call; otherwise a Function only costs.

    It costs more than the launch: binding its arguments, 40 µs. Tensor subclasses (fake ones too) count as watched.
    """
    if torch.compiler.is_compiling() or transformed():
        return True
    learns = torch.is_grad_enabled()
    for one in x:  # noqa: SIM110 - a generator would cost more than the questions
        if type(one) not in PLAIN or (learns and one.requires_grad):
            return True
    return False


def transformed() -> bool:
    """Whether a transform of `torch.func` or a forward-mode derivative is under way: these are refused, not dropped."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active()  # noqa: SLF001 - what Function.apply itself asks
        or forward_ad._current_level >= 0  # noqa: SLF001
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
            msg = "flash.rotate maps over everything but the axis of each plane"
            raise Unsupported(msg)
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
    return turn_out(x, position, inv_freq, rows, axis, factor, interleaved, inverse)[0]


def turn_out(x: Sequence[Tensor], *rest: Any) -> tuple[list[Tensor], Bound | None]:
    """Rotate out of place, and say how to do it again."""
    out = [torch.empty_like(one) for one in x]
    return out, launch(x, out, *rest)


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
        written(*x)


def written(*overwritten: Tensor) -> None:
    """Tell autograd what a launch overwrote, so that it refuses a backward that would read it."""
    torch.autograd.graph.increment_version([x for x in overwritten if not x.is_inference()])


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
    return (torch.ops.longspan.flash_rotate(given, *ctx.saved_tensors, factor, interleaved, not inverse), *[None] * 7)


# Where a transform looks through `Rotate` (torch.func.grad inside torch.compile), the operator must not lose gradients.
torch.library.register_autograd("longspan::flash_rotate", turn_back, setup_context=keep)
