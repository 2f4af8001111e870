"""FlashAttention and rotary embedding in portable Triton: NVIDIA sm_80 and up, AMD, and CPUs by interpretation."""

from .append import append_
from .attention import attention, attention_varlen
from .declines import declines
from .launch import INTERPRETED
from .machine import unavailable
from .merge import add_sink, merge
from .paged import attention_paged
from .rope import rerotate, rotate, rotate_, rotate_qk, rotate_qk_

__all__ = [
    "INTERPRETED", "add_sink", "append_", "attention", "attention_paged", "attention_varlen", "declines", "merge",
    "rerotate", "rotate", "rotate_", "rotate_qk", "rotate_qk_", "unavailable",
]  # fmt: skip
