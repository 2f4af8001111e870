"""The specification offered as a backend: any device, any dtype, O(m·n) memory."""

from typing import Any

import torch
from torch import Tensor

from longspan.spec import (
    add_sink,
    append,
    attention,
    attention_paged,
    attention_varlen,
    merge,
    rerotate,
    rotate,
    rotate_qk,
)

__all__ = [
    "add_sink", "append_", "attention", "attention_paged", "attention_varlen",
    "declines", "merge", "rerotate", "rotate", "rotate_qk", "unavailable",
]  # fmt: skip


def unavailable() -> str | None:
    """Say why this machine can never run the backend: it always can."""
    return None


def declines(operation: str, *args: Any, **kwargs: Any) -> str | None:  # noqa: ARG001
    """Say why a call would raise `Unsupported`: the definition serves every meaningful problem."""
    return None


def append_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, **kwargs: Any) -> None:
    """Write new keys and values into a cache in place, through which no gradient flows; see `longspan.spec.append`."""
    with torch.no_grad():
        keys, values = append(k, v, k_cache, v_cache, slot, **kwargs)
        k_cache.copy_(keys)
        v_cache.copy_(values)
