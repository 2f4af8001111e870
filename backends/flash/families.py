"""What `longspan tune` may choose of this backend's kernels."""

from typing import Final

from .attention_families import attention
from .decode_families import few, paged
from .merge_families import merge
from .rope_families import rotate

FAMILIES: Final = (
    attention("forward"), attention("backward_keys"), attention("backward_queries"), few(), paged(), rotate(),
    merge(),
)  # fmt: skip
