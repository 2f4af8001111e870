"""FlashAttention for sm_90, warp-specialised: Gluon kernels that feed the tensor cores through the bulk copy engine.

Attention of many queries is this package's own. What only moves bytes is at the memory's speed in `flash` already,
whose kernels serve here as well: rotation, appending, merging, sinks added to a state, and in fp16 and bf16 few queries
of a long cache, and caches in pages. Beside what every backend offers, it attends to heads of eight bits: `quantise`
makes them, `attention_quantised` takes them.
"""

from ..flash import add_sink, append_, merge, rerotate, rotate, rotate_, rotate_qk, rotate_qk_
from .attention import attention, attention_paged, attention_varlen
from .declines import declines
from .fp8 import attention_quantised, quantise
from .machine import unavailable

__all__ = [
    "add_sink", "append_", "attention", "attention_paged", "attention_quantised", "attention_varlen", "declines",
    "merge", "quantise", "rerotate", "rotate", "rotate_", "rotate_qk", "rotate_qk_", "unavailable",
]  # fmt: skip
