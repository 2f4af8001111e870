"""How attention enters autograd, `torch.func` and `torch.compile`: as that of `flash`, with the kernels of this one.

The backward is `backward.py`, which offers ``backward(call, q, k, v, out, lse, d_out, d_lse)``, the gradients of q, k,
v and of the sinks by sequence (``[b, h]``, or ``[b, 0]`` without sinks), and ``declines_backward(call, q, k, v)``.
Kernels are imported when they are first launched: Gluon is slow to import, and of no use on other machines.
"""

from typing import Any

import torch
from torch import Tensor

from ..flash import function as flash
from ..flash.function import REST, mapped, recording
from ..flash.rope_function import watched
from ..flash.rope_kernel import on
from ..registry import Unsupported
from .launch import Call, declines_address

torch.library.define(
    "longspan::hopper_attention", f"(Tensor q, Tensor k, Tensor v, {REST}, bool deterministic) -> (Tensor, Tensor)"
)
torch.library.define(
    "longspan::hopper_attention_backward",
    f"(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {REST}, bool deterministic)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def launch_call(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Run the forward kernel."""
    from .forward import forward  # noqa: PLC0415

    with on(q.device):
        return forward(call, q, k, v)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on what the operator takes."""
    addressable(q, k, v)
    return launch_call(call_of(*rest), q, k, v)


def addressable(*given: Tensor) -> None:
    """Refuse what the copy engine cannot address, where tensors had no memory to look at when they were first asked."""
    for name, x in zip("qkv", given, strict=True):
        reason = declines_address(name, x) if x.numel() else None
        if reason is not None:
            raise Unsupported(reason)


def call_of(*rest: Any) -> Call:
    """Name what the operators take beside tensors."""
    return Call(*rest[:-1], deterministic=rest[-1])


def launch_backward(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels. The gradient of the sinks is that of each sequence; empty where there are none."""
    from .backward import backward  # noqa: PLC0415

    addressable(q, k, v)
    with on(q.device):
        return backward(call_of(*rest), q, k, v, out, lse, d_out, d_lse)


torch.library.impl("longspan::hopper_attention", "cuda", launch_forward)
torch.library.impl("longspan::hopper_attention_backward", "cuda", launch_backward)


@torch.library.register_fake("longspan::hopper_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    b, h, m, _ = q.shape
    return q.new_empty(b, h, m, v.shape[3], dtype=rest[-2]), q.new_empty(b, h, m, dtype=torch.float32)


@torch.library.register_fake("longspan::hopper_attention_backward")
def _(
    _d_out: Tensor, _d_lse: Tensor | None, _out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(q.shape[0], 0 if sink is None else q.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Attend, through autograd where it could be looking: binding a Function's arguments costs more than a launch."""
    if watched(q, k, v) or (sink is not None and watched(sink)):
        return Attention.apply(q, k, v, sink, *rest)
    return launch_forward(q, k, v, sink, *rest)


def forward_or_record(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Launch, or call the operator."""
    return torch.ops.longspan.hopper_attention(q, *rest) if recording(q) else launch_forward(q, *rest)


def backward_or_record(d_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch, or call the operator."""
    if recording(d_out):
        return torch.ops.longspan.hopper_attention_backward(d_out, *rest)
    return launch_backward(d_out, *rest)


class Attention(flash.Attention):
    """``(q, k, v, sink, alibi, rows, sequences, interval, scale, softcap, out_dtype, deterministic)`` → ``(out, lse)``.

    What it keeps for the backward pass is what `flash` keeps.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        """Launch the forward kernel."""
        return forward_or_record(*args)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        """Launch the backward kernels."""
        *inputs, out, lse = ctx.saved_tensors
        q, k, v, sink = inputs[:4]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        # dynamo cannot trace a Function inside a backward
        run = backward_or_record if torch.compiler.is_compiling() else AttentionBackward.apply
        dq, dk, dv, d_sink = run(d_out, d_lse, out, lse, q, k, v, *inputs[3:], *ctx.options)
        d_sink = None if sink is None else (d_sink.sum(0) if sink.ndim == 1 else d_sink).to(sink.dtype)
        return dq, dk, dv, d_sink, *[None] * (3 + len(ctx.options))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch."""
        return mapped(Attention, info.batch_size, dims, args, 3)


# Where a transform looks through the Function (torch.func.grad inside torch.compile), the operator keeps the gradients.
torch.library.register_autograd("longspan::hopper_attention", Attention.backward, setup_context=Attention.setup_context)


class AttentionBackward(flash.AttentionBackward):
    """``(d_out, d_lse, out, lse, q, k, v, …)`` → ``(dq, dk, dv, dsink [b, h])``; not differentiable again."""

    @staticmethod
    def forward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Launch the backward kernels."""
        return backward_or_record(d_out, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        """Refuse the second derivative."""
        reason = "hopper.attention has no second derivative"
        raise Unsupported(reason, alternatives=("eager",))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch."""
        return mapped(AttentionBackward, info.batch_size, dims, args, 7)
