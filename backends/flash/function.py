"""How attention enters autograd, `torch.func` and `torch.compile`: a Function outside, an operator in captured graphs.

Both kernels are reached through `forward_or_record` and `backward_or_record`: the raw launcher in eager, where an
operator's dispatch would cost more than the launch, and the operator wherever tensors have no memory to launch on.
"""

from typing import Any

import torch
from torch import Tensor

from ..registry import Unsupported
from . import decode
from .backward import backward
from .forward import forward
from .launch import Call, quiet
from .rope_function import PLAIN, unit, watched
from .rope_kernel import on

# What both operators take beside q, k and v.
REST = (
    "Tensor? sink, Tensor? alibi, Tensor? rows, Tensor? sequences, SymInt[] interval, float scale, float? softcap,"
    " ScalarType out_dtype"
)
torch.library.define("longspan::flash_attention", f"(Tensor q, Tensor k, Tensor v, {REST}) -> (Tensor, Tensor)")
torch.library.define(
    "longspan::flash_attention_backward",
    f"(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {REST})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def launch_call(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: that of few queries where they are few."""
    run = decode.forward if decode.few(q, k, v) else forward
    with on(q.device), quiet():
        return run(call, q, k, v)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on what the operator takes."""
    return launch_call(Call(*rest), q, k, v)


def launch_backward(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels. The gradient of the sinks is that of each sequence; empty where there are none."""
    with on(q.device), quiet():
        return backward(Call(*rest), q, k, v, out, lse, d_out, d_lse)


torch.library.impl("longspan::flash_attention", ("cuda", "cpu"), launch_forward)
torch.library.impl("longspan::flash_attention_backward", ("cuda", "cpu"), launch_backward)


@torch.library.register_fake("longspan::flash_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    b, h, m, _ = q.shape
    return q.new_empty(b, h, m, v.shape[3], dtype=rest[-1]), q.new_empty(b, h, m, dtype=torch.float32)


@torch.library.register_fake("longspan::flash_attention_backward")
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
    return forward_or_record(q, k, v, sink, *rest)


def revealed(*given: Any) -> tuple[Any, ...]:
    """Let a compiler see which tensors want gradients, before anybody asks whether they do.

    Under torch.func.grad, dynamo takes what it differentiates for constants until something was done to it.
    """
    if not torch.compiler.is_compiling():
        return given
    return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in given)


def recording(x: Tensor) -> bool:
    """Whether a graph is being captured, or the tensor is one of those without memory that tracing uses."""
    return torch.compiler.is_compiling() or type(x) not in PLAIN


def forward_or_record(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Launch, or call the operator."""
    return torch.ops.longspan.flash_attention(q, *rest) if recording(q) else launch_forward(q, *rest)


def backward_or_record(d_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch, or call the operator."""
    if recording(d_out):
        return torch.ops.longspan.flash_attention_backward(d_out, *rest)
    return launch_backward(d_out, *rest)


def folded(x: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """Merge a mapped dimension, or ``size`` repetitions, with the batch at dimension ``at``."""
    if dim is None:
        x = x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:])
        return x.flatten(at, at + 1).contiguous()  # of a batch of one this would be a view that repeats itself
    return unit(x.movedim(dim, at).flatten(at, at + 1))


def folded_heads(x: Tensor, dim: int | None, size: int, b: int) -> Tensor:
    """Merge a mapped dimension of a number per head, [h] or [b, h], with the batch."""
    if dim is None:
        return x if x.ndim == 1 else folded(x, None, size)
    x = x.movedim(dim, 0)
    return (x.unsqueeze(1).expand(-1, b, -1) if x.ndim == 2 else x).flatten(0, 1).contiguous()


def mapped(
    function: type[torch.autograd.Function], size: int, dims: tuple[Any, ...], args: tuple[Any, ...], count: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply a function whose first ``count`` arguments carry the batch first, a mapped dimension folded into it."""
    b = args[0].shape[0] if dims[0] is None else args[0].movedim(dims[0], 0).shape[1]
    batched = [None if x is None else folded(x, dim, size) for x, dim in zip(args[:count], dims[:count], strict=True)]
    heads = zip(args[count : count + 2], dims[count : count + 2], strict=True)
    per_head = [None if x is None else folded_heads(x, dim, size, b) for x, dim in heads]
    rows, sequences = args[count + 2 : count + 4]
    rows = None if rows is None else folded(rows, dims[count + 2], size, 1).contiguous()
    sequences = None if sequences is None else folded(sequences, dims[count + 3], size).contiguous()
    results = function.apply(*batched, *per_head, rows, sequences, *args[count + 4 :])
    return tuple(x.unflatten(0, (size, b)) for x in results), (0,) * len(results)


class Attention(torch.autograd.Function):
    """``(q, k, v, sink, alibi, rows, sequences, interval, scale, softcap, out_dtype)`` → ``(out, lse)``."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, alibi: Tensor | None,
        rows: Tensor | None, sequences: Tensor | None, interval: tuple[int, ...], scale: float, softcap: float | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Launch the forward kernel."""
        return forward_or_record(q, k, v, sink, alibi, rows, sequences, interval, scale, softcap, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs and both outputs: O(tokens)."""
        ctx.save_for_backward(*inputs[:7], *output)
        ctx.options = inputs[7:]
        ctx.set_materialize_grads(False)

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
torch.library.register_autograd("longspan::flash_attention", Attention.backward, setup_context=Attention.setup_context)


class AttentionBackward(torch.autograd.Function):
    """``(d_out, d_lse, out, lse, q, k, v, …)`` → ``(dq, dk, dv, dsink [b, h])``; not differentiable again."""

    @staticmethod
    def forward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Launch the backward kernels."""
        return backward_or_record(d_out, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        """Refuse the second derivative."""
        reason = "flash.attention has no second derivative"
        raise Unsupported(reason)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Fold the mapped dimension into the batch."""
        return mapped(AttentionBackward, info.batch_size, dims, args, 7)
