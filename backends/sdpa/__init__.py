"""PyTorch's own attention kernels as a backend, on CPU and CUDA: O(tokens) memory, a second opinion everywhere.

What a kernel lacks (windows, documents, bottom-right causal, lengths, sinks, a gradient through the LSE) is made of
several calls, exactly; what no tiling can make (softcap, ALiBi) is declined. Rotation and merging are the
specification's own PyTorch operations.
"""

from longspan.spec import add_sink, merge, rerotate, rotate, rotate_qk

from .append import append_
from .attention import attention, attention_paged, attention_varlen, declines

__all__ = [
    "add_sink", "append_", "attention", "attention_paged", "attention_varlen",
    "declines", "merge", "rerotate", "rotate", "rotate_qk", "unavailable",
]  # fmt: skip


def unavailable() -> str | None:
    """Say why this machine can never run the backend: PyTorch has kernels for every CPU."""
    return None
