"""Attention of the backend `hopper` as autograd, `torch.func` and `torch.compile` see it; see `flash.autograd`.

The backward is `backward.py`, which offers ``backward(call, q, k, v, out, lse, d_out, d_lse)``, the gradients of q, k,
v and of the sinks by sequence (``[b, h]``, or ``[b, 0]`` without sinks).
Kernels are imported when they are first launched: Gluon is slow to import, and of no use on other machines.
"""

from typing import Any

from torch import Tensor

from ..flash import decode
from ..flash import function as flash
from ..flash.autograd import Four, Two, entered
from ..flash.fitting import fitting
from ..flash.rope_kernel import on
from ..registry import serve
from .launch import OTHERS, Call, declines_address


def launch_call(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Two:
    """Run the forward kernel: that of few queries where they are few, which is one with `flash`'s."""
    if decode.few(q, k, v):
        return flash.launch_call(call, q, k, v)
    with on(q.device):
        return forward(call, q, k, v)


@fitting
def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Two:
    """Run the forward kernel of many queries."""
    from .forward import forward  # noqa: PLC0415

    return forward(call, q, k, v)


@fitting
def backward(call: Call, *given: Any) -> Four:
    """Run the backward kernels; ``given`` is q, k, v, out, lse, d_out and d_lse."""
    from .backward import backward  # noqa: PLC0415
    from .backward_choices import chosen  # noqa: PLC0415

    return backward(call, *given, chosen(call, *given[:3]))


def launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Two:
    """Run the forward kernel on what the operator takes."""
    reason = None if decode.few(q, k, v) else declines_addresses(q, k, v)
    serve(reason, OTHERS)  # tensors had no memory to look at when they were first asked
    return launch_call(call_of(*rest), q, k, v)


def declines_addresses(*given: Tensor) -> str | None:
    """Say why the copy engine cannot address q, k or v, or None."""
    reasons = (declines_address(name, x) if x.numel() else None for name, x in zip("qkv", given, strict=True))
    return next((reason for reason in reasons if reason is not None), None)


def call_of(*rest: Any) -> Call:
    """Name what the operators take beside tensors."""
    return Call(*rest[:-1], deterministic=rest[-1])


def launch_backward(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Four:
    """Run the backward kernels. The gradient of the sinks is that of each sequence; empty where there are none.

    Few queries, which need not lie where the copy engine can address them, may need `flash`'s.
    """
    if declines_addresses(q, k, v) is not None:
        return flash.launch_backward(d_out, d_lse, out, lse, q, k, v, *rest[:-1])
    with on(q.device):
        return backward(call_of(*rest), q, k, v, out, lse, d_out, d_lse)


attend = entered(
    "longspan::hopper_attention", launch_forward, launch_backward, devices=("cuda",), more=", bool deterministic"
)
