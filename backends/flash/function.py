"""Attention of the backend `flash` as autograd, `torch.func` and `torch.compile` see it; see `autograd`."""

from typing import Any

from torch import Tensor

from . import decode
from .autograd import Four, Two, entered
from .backward import backward
from .forward import forward
from .launch import Call, quiet
from .rope_kernel import on


def launch_call(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Two:
    """Run the forward kernel: that of few queries where they are few."""
    run = decode.forward if decode.few(q, k, v) else forward
    with on(q.device), quiet():
        return run(call, q, k, v)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Two:
    """Run the forward kernel on what the operator takes."""
    return launch_call(Call(*rest), q, k, v)


def launch_backward(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> Four:
    """Run the backward kernels. The gradient of the sinks is that of each sequence; empty where there are none."""
    with on(q.device), quiet():
        return backward(Call(*rest), q, k, v, out, lse, d_out, d_lse)


attend = entered("longspan::flash_attention", launch_forward, launch_backward, devices=("cuda", "cpu"))
