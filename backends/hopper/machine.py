"""Which machines the kernels run on: sm_90 alone, whose wgmma no later GPU has."""

from importlib.util import find_spec
from typing import Final

import torch

from ..flash import INTERPRETED

CAPABILITY: Final = (9, 0)


def unavailable() -> str | None:
    """Say why this machine can never run the backend, or None."""
    if INTERPRETED:
        return "hopper cannot be interpreted: Gluon has no interpreter"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "hopper needs an NVIDIA GPU of compute capability 9.0 (H100, H200, GH200)"
    if (capability := torch.cuda.get_device_capability()) != CAPABILITY:
        return f"hopper needs compute capability 9.0 (H100, H200, GH200), got {capability[0]}.{capability[1]}"
    if find_spec("triton.experimental.gluon") is None:
        return "hopper needs a Triton with Gluon, 3.6 or later"
    return None
