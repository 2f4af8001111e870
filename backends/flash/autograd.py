"""How attention enters autograd, `torch.func` and `torch.compile`: a Function outside, an operator in captured graphs.

A backend hands in its two launchers. In eager these are called as they are, since an operator's dispatch would cost
more than a launch; the operator is called wherever tensors have no memory to launch on.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ..registry import Unsupported
from .rope_function import PLAIN, unit, watched

Two = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
# What both operators take beside q, k and v.
REST: Final = (
    "Tensor? sink, Tensor? alibi, Tensor? rows, Tensor? sequences, SymInt[] interval, float scale, float? softcap,"
    " ScalarType out_dtype"
)
OUT_DTYPE: Final = REST.count(",")  # its place among them


def entered(  # noqa: C901 - two classes, each of whose methods counts
    name: str, forward: Callable[..., Two], backward: Callable[..., Four], *, devices: tuple[str, ...], more: str = ""
) -> Callable[..., Two]:
    """Register the operators ``name`` and ``name_backward``; return attention as a function that autograd sees through.

    Args:
        name: ``namespace::backend_attention``.
        forward: From q, k, v and `REST` to out and lse.
        backward: From d_out, d_lse, out, lse, q, k, v and `REST` to dq, dk, dv and the sinks' gradient ``[b, h]``,
            or ``[b, 0]`` without sinks.
        devices: Kinds of device on which the launchers run.
        more: What the operators take beside `REST`.
    """
    namespace, short = name.split("::")
    given = f"Tensor q, Tensor k, Tensor v, {REST}{more}"
    back = f"{name}_backward"
    torch.library.define(name, f"({given}) -> (Tensor, Tensor)")
    torch.library.define(
        back, f"(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {given}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    for of, launch, fake in ((name, forward, fake_forward), (back, backward, fake_backward)):
        torch.library.impl(of, devices, launch)
        torch.library.register_fake(of, fake)
    operators = getattr(torch.ops, namespace)
    operator, operator_backward = getattr(operators, short), getattr(operators, f"{short}_backward")

    def forward_or_record(q: Tensor, *rest: Any) -> Two:
        """Launch, or call the operator."""
        return operator(q, *rest) if recording(q) else forward(q, *rest)

    def backward_or_record(d_out: Tensor, *rest: Any) -> Four:
        """Launch, or call the operator."""
        return operator_backward(d_out, *rest) if recording(d_out) else backward(d_out, *rest)

    class Attention(torch.autograd.Function):
        """``(q, k, v, sink, alibi, rows, sequences, interval, scale, softcap, out_dtype, …)`` → ``(out, lse)``."""

        @staticmethod
        def forward(*args: Any) -> Two:
            """Launch the forward kernel."""
            return forward_or_record(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Two) -> None:
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

    class AttentionBackward(torch.autograd.Function):
        """``(d_out, d_lse, out, lse, q, k, v, …)`` → ``(dq, dk, dv, dsink [b, h])``; not differentiable again."""

        @staticmethod
        def forward(d_out: Tensor, *rest: Any) -> Four:
            """Launch the backward kernels."""
            return backward_or_record(d_out, *rest)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            """Keep nothing."""

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
            """Refuse the second derivative."""
            reason = f"{short.removesuffix('_attention')}.attention has no second derivative"
            raise Unsupported(reason)

        @staticmethod
        def vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
            """Fold the mapped dimension into the batch."""
            return mapped(AttentionBackward, info.batch_size, dims, args, 7)

    # Where a transform looks through the Function (torch.func.grad inside torch.compile), the operator keeps them.
    torch.library.register_autograd(name, Attention.backward, setup_context=Attention.setup_context)

    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *rest: Any) -> Two:
        """Attend, through autograd where it could be looking: binding its arguments costs more than a launch."""
        if watched(q, k, v) or (sink is not None and watched(sink)):
            return Attention.apply(q, k, v, sink, *rest)
        return forward(q, k, v, sink, *rest)

    return attend


def fake_forward(q: Tensor, _k: Tensor, v: Tensor, *rest: Any) -> Two:
    """Shapes and dtypes of out and lse."""
    b, h, m, _ = q.shape
    return q.new_empty(b, h, m, v.shape[3], dtype=rest[OUT_DTYPE]), q.new_empty(b, h, m, dtype=torch.float32)


def fake_backward(
    _d_out: Tensor, _d_lse: Tensor | None, _out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *_: Any,
) -> Four:  # fmt: skip
    """Shapes and dtypes of the gradients."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(q.shape[0], 0 if sink is None else q.shape[1])


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
