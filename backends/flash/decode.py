"""Few queries against many keys: decoding, speculation, the last chunk of a prompt. The keys are split over programs.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from typing import Final

from torch import Tensor

from .launch import Call

WIDEST: Final = 256  # of a head, keys or values


def few(q: Tensor, k: Tensor, v: Tensor) -> bool:  # noqa: ARG001
    """Whether the queries are so few that the keys are split over programs; from shapes alone."""
    return False


def widest(q: Tensor, k: Tensor, v: Tensor) -> int:  # noqa: ARG001
    """Largest head dimension that is served on these shapes."""
    return WIDEST


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend where `few` says so: ``out [b, h, m, e]`` contiguous, and ``lse [b, h, m]`` float32."""
    raise NotImplementedError
