"""Which machines the kernels run on."""

import torch

from .launch import INTERPRETED

OLDEST = (8, 0)  # compute capability: bfloat16 and asynchronous copies


def unavailable() -> str | None:
    """Say why this machine can never run the backend, or None."""
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "flash needs a GPU (under TRITON_INTERPRET=1 a CPU interprets it, for tests)"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability()) < OLDEST:
        return f"flash needs compute capability {OLDEST[0]}.{OLDEST[1]} or later, got {capability[0]}.{capability[1]}"
    return None
