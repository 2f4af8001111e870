"""Appending to a cache: new keys are rotated, then keys and values are written to their slots.

A dense cache ``[b, g, n, d]`` and a pool of pages ``[pages, g, page, d]`` are one thing: rows of
equally many columns. A slot counts both: ``row · size + column`` (PagedAttention's slot mapping).
Shapes: tokens new tokens of all sequences together, g key heads, size columns of a row.
"""

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .checks import check_append
from .pairing import Pairing
from .rope import Rotation, rotate


def append(
    k: Float[Tensor, "tokens g d"],
    v: Float[Tensor, "tokens g e"],
    k_cache: Float[Tensor, "rows g size d"],
    v_cache: Float[Tensor, "rows g size e"],
    slot: Int[Tensor, " tokens"],
    *,
    position: Int[Tensor, "*axes tokens"] | None = None,
    rotation: Rotation | None = None,
    pairing: Pairing = "half",
) -> tuple[Float[Tensor, "rows g size d"], Float[Tensor, "rows g size e"]]:
    """Return the caches with new tokens written into them; the caches given do not change.

    Args:
        k: New keys, not yet rotated.
        v: New values.
        k_cache: Cached keys, already rotated.
        v_cache: Cached values.
        slot: Where each token goes, ``row · size + column``; -1 skips the token. No slot twice.
        position: Position of each token, ``[tokens]`` or ``[axes, tokens]``; only with a rotation.
        rotation: How the new keys turn, its rows one for all or one per token; None leaves them as they are.
        pairing: See `rotate`.

    Raises:
        ValueError: For shapes that do not fit, or a rotation without positions.
        IndexError: For a slot outside the cache.
    """
    check_append(k, v, k_cache, v_cache, slot, position, rotation is not None)
    k = k if rotation is None or position is None else turned(k, position, rotation, pairing)
    return write(k_cache, k, slot), write(v_cache, v, slot)


def turned(
    k: Float[Tensor, "tokens g d"], position: Int[Tensor, "*axes tokens"], rotation: Rotation, pairing: Pairing
) -> Float[Tensor, "tokens g d"]:
    """Rotate new keys, each a sequence of one token."""
    heads, at = rearrange(k, "tokens g d -> tokens g 1 d"), rearrange(position, "... tokens -> ... tokens 1")
    return rearrange(rotate(heads, at, rotation, pairing=pairing), "tokens g 1 d -> tokens g d")


def write(
    cache: Float[Tensor, "rows g size d"], x: Float[Tensor, "tokens g d"], slot: Int[Tensor, " tokens"]
) -> Float[Tensor, "rows g size d"]:
    """Replace the slots that are named, and no other."""
    kept = slot >= 0
    if not cache.numel():
        return cache
    flat = rearrange(cache, "rows g size d -> (rows size) g d")
    written = flat.index_copy(0, slot[kept].long(), x[kept].to(cache.dtype))
    return rearrange(written, "(rows size) g d -> rows g size d", size=cache.shape[2])
