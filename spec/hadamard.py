"""Incoherent processing: turn queries and keys so that no coordinate stands out (FlashAttention-3, §3.3).

One orthogonal matrix on queries and keys alike leaves every product q · k as it was. A Hadamard matrix times random
signs spreads an outlier over all coordinates, so that a scale (`longspan.spec.quantise`) need not make room for it
(QuIP, arXiv:2307.13304; QuaRot, arXiv:2404.00456).
Shapes: b batch, h heads, n tokens, d = 2^a · c head dimension, c odd.
"""

import math
from functools import reduce

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64
from torch import Tensor

from .checks import FLOATS, check_count, check_tensors, floating, refuse, same_device

STEP, MIX_1, MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hadamard(x: Float[Tensor, "b h n d"], signs: Float[Tensor, " d"]) -> Float[Tensor, "b h n d"]:
    """Multiply every token by ``diag(signs) · H``, an orthogonal matrix.

    H is Sylvester's matrix of order 2^a, over 2^(a/2), on each of c parts of the head.

    Args:
        x: Queries or keys, after their rotary embedding.
        signs: 1 or -1 for each coordinate, the same for queries and keys; see `random_signs`.

    Raises:
        ValueError: For what is no heads, and signs that are not one number for each of their coordinates.
    """
    check_tensors(x=x, signs=signs)
    same_device(x=x, signs=signs)
    if x.ndim != 4 or x.dtype not in FLOATS or x.shape[3] == 0:
        refuse("x", "a floating tensor [batch, heads, tokens, head_dim]", f"{x.dtype} {list(x.shape)}")
    if list(signs.shape) != [x.shape[3]] or signs.dtype not in FLOATS:
        refuse(
            "signs", f"one floating number for each coordinate, [{x.shape[3]}]", f"{signs.dtype} {list(signs.shape)}"
        )
    matrix = sylvester(x.shape[3] & -x.shape[3]).to(x.device, floating(x))
    parts = rearrange(x.to(floating(x)) * signs.to(floating(x)), "b h n (c i) -> b h n c i", i=matrix.shape[0])
    turned = rearrange(einsum(parts, matrix, "b h n c i, i j -> b h n c j"), "b h n c j -> b h n (c j)")
    return turned.to(x.dtype)


def sylvester(order: int) -> Float64[Tensor, "i i"]:
    """Sylvester's Hadamard matrix of a power of two, made orthogonal: ``H_2n = H_2 ⊗ H_n``."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    return reduce(torch.kron, [two] * int(math.log2(order)), one) / math.sqrt(order)


def random_signs(d: int, seed: int, *, device: torch.device | str | None = None) -> Float64[Tensor, " d"]:
    """Signs that look random and are the same everywhere: bits of SplitMix64 (Steele et al. 2014) under a seed.

    Keys that were cached with them meet queries of another process.

    Raises:
        ValueError: For no coordinate, or a seed that is no whole number from 0 to below 2^31.
    """
    check_count("d", d, 1)
    check_count("seed", seed, 0)
    state = (torch.arange(1, d + 1, device=device) + (seed << 32)) * STEP
    state = (state ^ unsigned_shift(state, 30)) * MIX_1
    state = (state ^ unsigned_shift(state, 27)) * MIX_2
    return 1.0 - 2.0 * (unsigned_shift(state, 63)).to(torch.float64)


def unsigned_shift(x: Tensor, bits: int) -> Tensor:
    """Shift the bits of int64 to the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
