"""PyTorch's own attention kernels that give out and LSE, as one table: device and dtype → operators.

Each is exact attention over a rectangle of scores (FlashAttention-2, arXiv:2307.08691; on CUDA also memory-efficient
attention, arXiv:2112.05682, the one that takes a bias). Everything that depends on the device stands here.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d one head dimension for q, k and v.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

ATEN: Final = torch.ops.aten


class Kernel(NamedTuple):
    """Attention over one rectangle, without dropout.

    ``forward(q, k, v, bias, causal, scale)`` returns out [b, h, m, d] and lse [b, h, m]; ``backward(d_out, q, k, v,
    bias, out, lse, causal, scale)`` returns dq, dk, dv. Causal is top-left, and bias is [m, n] or None.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Device(NamedTuple):
    """What a kind of device asks of the calls.

    Attributes:
        multiple: Head dimensions are padded with zeros to a multiple of it.
        rows: Fewest and most query rows of one call where a mask cuts through.
    """

    multiple: int
    rows: tuple[int, int]


DEVICES: Final = {"cpu": Device(multiple=1, rows=(64, 512)), "cuda": Device(multiple=8, rows=(256, 2048))}
FLASH_DIM: Final = 256  # the widest head that the CUDA flash operator takes


def compute_dtype(q: Tensor) -> torch.dtype:
    """Dtype the kernels run in. On a CPU half precision is no faster, and its exp has 20 bits: float32 there."""
    half = q.dtype in {torch.float16, torch.bfloat16}
    return torch.float32 if half and q.device.type == "cpu" else q.dtype


def lacks(q: Tensor) -> str | None:
    """Say why no kernel serves tensors like q, or None."""
    kind = q.device.type
    if kind not in DEVICES:
        return f"PyTorch gives no log-sum-exp of its attention kernels on {kind}, only on {' and '.join(DEVICES)}"
    if kind == "cuda" and q.dtype == torch.float64:
        return "PyTorch's CUDA attention kernels do not compute in float64"
    if kind == "cuda" and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "PyTorch's CUDA attention kernels take bfloat16 from sm_80 on"
    return None


def repeats(device: torch.device) -> bool:
    """Tell whether gradients are bitwise repeatable: on CUDA only when all of PyTorch is told to be deterministic."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return device.type != "cuda" or strict


def laid(x: Tensor) -> Tensor:
    """Lay a tensor out as kernels take for granted: dims side by side, and on CUDA rows at multiples of 16 bytes."""
    starts = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])] if x.is_cuda else []
    fits = x.stride(-1) == 1 and all(start % 16 == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def kernel(q: Tensor, *, masked: bool) -> Kernel:
    """Choose the operators for tensors like q, already in `compute_dtype` and padded."""
    if q.device.type == "cpu":
        return Kernel(cpu_forward, cpu_backward)
    half = q.dtype in {torch.float16, torch.bfloat16}
    if not masked and half and q.shape[-1] <= FLASH_DIM and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return Kernel(flash_forward, flash_backward)
    return Kernel(efficient_forward, efficient_backward)


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Call the CPU flash operator, which reads grouped heads as they are."""
    return ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def cpu_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the backward of the CPU flash operator."""
    return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Call the CUDA flash operator (float16 and bfloat16, no bias), which reads grouped heads as they are."""
    del bias
    out, lse, *_ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse[..., : q.shape[2]]


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the backward of the CUDA flash operator."""
    del bias
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout, of which there is none
    return ATEN._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
        scale=scale,
    )  # fmt: skip


def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Call memory-efficient attention (CUDA: float32, or a bias), which wants every head to have its own keys."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out, lse, *_ = ATEN._scaled_dot_product_efficient_attention(
        q, k, v, aligned(bias, q), True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]


def efficient_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the backward of memory-efficient attention, and add up the gradients of shared keys."""
    g, r = k.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(r, 1) for x in (k, v))
    # In half precision it reads out as the forward lays it out, [b, m, h, d], whatever its strides say: any other
    # layout gives wrong dq and dk without a word (torch 2.11 on sm_90).
    out = rearrange(rearrange(out, "b h m d -> b m h d").contiguous(), "b m h d -> b h m d")
    # It reads whole blocks of rows; exp(-inf) is no weight.
    lse = pad(lse.contiguous(), (0, -q.shape[2] % 32), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = ATEN._scaled_dot_product_efficient_attention_backward(
        d_out, q, k, v, aligned(bias, q), out, lse, unused, unused, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, *(x.unflatten(1, (g, r)).sum(2, dtype=torch.float32) for x in (dk, dv))


def aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """Give a bias rows that start at multiples of 16 elements, as the operator wants, and a batch and heads."""
    if bias is None:
        return None
    n = bias.shape[-1]
    return pad(bias, (0, -n % 16))[:, :n].expand(*q.shape[:2], -1, -1)
