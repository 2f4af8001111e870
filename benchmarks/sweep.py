# pyright: reportIndexIssue=false, reportCallIssue=false
"""Reading keys and values once and keeping next to nothing: the ceiling for decode, as exact as a sum of integers.

Shapes: two contiguous tensors of equally many bytes, seen as 32-bit words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048  # of 32 bits, a step of a program: two loads of 16 bytes a thread and tensor
MANY = 2**25  # words above which a program takes several steps
STEPS = 8


@triton.jit
def _sweep(x, y, sums, words, N: tl.constexpr, STEPS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([N], tl.int64)
    for step in tl.static_range(STEPS):
        at = (program * STEPS + step) * N + tl.arange(0, N)
        total += tl.load(x + at, mask=at < words, other=0).to(tl.int64)
        total += tl.load(y + at, mask=at < words, other=0)
    tl.store(sums + program, tl.sum(total, 0))


def sweep(x: Tensor, y: Tensor) -> Tensor:
    """Sum the words of each stretch of both tensors, int64 [stretches]."""
    x, y = (t.view(-1).view(torch.int32) for t in (x, y))
    sums = torch.empty(-(-x.numel() // stretch(x.numel())), dtype=torch.int64, device=x.device)
    _sweep[(sums.numel(),)](x, y, sums, x.numel(), WORDS, stretch(x.numel()) // WORDS, num_warps=8)
    return sums


def stretch(words: int) -> int:
    """Words of each tensor that one program sums up."""
    return WORDS * (STEPS if words > MANY else 1)
