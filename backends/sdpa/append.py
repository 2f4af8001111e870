"""Appending to a cache in place: only the slots named are touched; see `longspan.spec.append`.

Shapes: tokens new tokens of all sequences together, g key heads, size columns of a row.
"""

import torch
from torch import Tensor

from longspan.spec import Rotation
from longspan.spec.append import turned
from longspan.spec.checks import check_append
from longspan.spec.pairing import Pairing


def append_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    *,
    position: Tensor | None = None,
    rotation: Rotation | None = None,
    pairing: Pairing = "half",
) -> None:
    """Rotate new keys, and write keys and values into their slots, ``row · size + column``; -1 skips a token.

    Raises:
        ValueError: For shapes that do not fit, or a rotation without positions.
        IndexError: For a slot outside the cache (on CUDA a device-side assertion, as of any index).
    """
    check_append(k, v, k_cache, v_cache, slot, position, rotation is not None)
    k = k if rotation is None or position is None else turned(k, position, rotation, pairing)
    kept = slot >= 0
    row, column = (x.long()[kept] for x in (slot.div(k_cache.shape[2] or 1, rounding_mode="floor"), slot))
    column = column % (k_cache.shape[2] or 1)
    with torch.no_grad():
        k_cache[row, :, column], v_cache[row, :, column] = k[kept], v[kept]
