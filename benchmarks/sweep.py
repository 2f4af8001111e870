# pyright: reportIndexIssue=false, reportCallIssue=false
"""Reading memory once and keeping next to nothing: the ceiling for decode, as exact as a sum of integers.

Shapes: x any tensor of a whole number of 32-bit words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 4096  # of 32 bits, a step of a program
STEPS = 8


@triton.jit
def _sweep(x, sums, words, N: tl.constexpr, STEPS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([N], tl.int64)
    for step in tl.static_range(STEPS):
        at = (program * STEPS + step) * N + tl.arange(0, N)
        total += tl.load(x + at, mask=at < words, other=0).to(tl.int64)
    tl.store(sums + program, tl.sum(total, 0))


def sweep(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sum the words of each stretch of each contiguous tensor."""
    return tuple(swept(x) for x in tensors)


def swept(x: Tensor) -> Tensor:
    """Sum the words of each stretch of one tensor."""
    words = x.view(-1).view(torch.int32)
    sums = torch.empty(-(-words.numel() // (WORDS * STEPS)), dtype=torch.int64, device=x.device)
    _sweep[(sums.numel(),)](words, sums, words.numel(), WORDS, STEPS, num_warps=8)
    return sums
