"""Heads in eight bits: e4m3 numbers and what to multiply them with (FlashAttention-3, arXiv:2407.08608, §3.3).

    scale = max |x| / 448        values = round(x / scale)        x ≈ values · scale

The maximum is that of a block of tokens, and 448 the largest number of e4m3. The block is a whole head ("per-tensor",
for each head and sequence) or a number of tokens (the paper's block quantisation).
Attention to quantised heads is, by definition, attention to what they stand for.
Shapes: b batch, h heads, n tokens, d head dimension, t blocks of tokens: t = ⌈n / block⌉.
"""

from typing import Final, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor
from torch.nn.functional import pad

from .attention import attention
from .checks import FLOATS, check_count, check_tensors, floating, refuse, same_device
from .masks import Mask, everything
from .state import AttentionState

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0  # of e4m3: 1.75 · 2^8
LEAST: Final = 2.0**-126  # a scale of float32 that hardware does not flush to zero


class Quantised(NamedTuple):
    """Heads as e4m3 numbers: token j of a head stands for ``values[j] · scale[j // block]``.

    Attributes:
        values: The numbers, of at most 448.
        scale: What those of a block are multiplied with.
        block: Tokens of a block; None where the whole head is one.
    """

    values: Float8e4m3fn[Tensor, "b h n d"]
    scale: Float32[Tensor, "b h t"]
    block: int | None = None


def quantise(x: Float[Tensor, "b h n d"], *, block: int | None = None) -> Quantised:
    """Round heads to e4m3 under a scale for each block: its largest magnitude / 448.

    What is in the range of normal numbers is off by at most 2^-4 of itself; what is below 2^-6 · scale, by at most
    2^-10 · scale.

    Args:
        x: Queries, keys or values, within the range of float32.
        block: Tokens that share a scale; by default all of a head do.

    Returns:
        The numbers and their scales. A block of zeros keeps its zeros, under the least scale there is. NaN stays NaN,
        an infinity, which e4m3 has not, becomes NaN, and neither counts as the largest of its block.

    Raises:
        ValueError: For what is no heads, and a block of no token.
    """
    check_tensors(x=x)
    if x.ndim != 4 or x.dtype not in FLOATS or x.shape[3] == 0:
        refuse("x", "a floating tensor [batch, heads, tokens, head_dim]", f"{x.dtype} {list(x.shape)}")
    if block is not None:
        check_count("block", block, 1)
    size, blocks = blocks_of(x.shape[2], block)
    whole = pad(x.to(floating(x)), (0, 0, 0, size * blocks - x.shape[2]))
    tiles = rearrange(whole, "b h (t size) d -> b h t size d", t=blocks, size=size)
    largest = tiles.abs().masked_fill(~tiles.isfinite(), 0.0).amax((3, 4))
    # By a tensor: a GPU multiplies with the rounded inverse of a number.
    scale = (largest / torch.full_like(largest, LARGEST)).clamp(min=LEAST).to(torch.float32)
    scaled = x.to(floating(x)) / by_token(scale, x.shape[2], block)
    return Quantised(scaled.masked_fill(scaled.isinf(), torch.nan).to(E4M3), scale, block)


def dequantise(x: Quantised, dtype: torch.dtype = torch.float64) -> Float[Tensor, "b h n d"]:
    """What quantised heads stand for; exactly, in float64.

    Raises:
        ValueError: For numbers and scales that do not fit each other.
    """
    check_quantised(x=x)
    return x.values.to(dtype) * by_token(x.scale, x.values.shape[2], x.block).to(dtype)


def attention_quantised(
    q: Quantised,
    k: Quantised,
    v: Quantised,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    q_offset: int | Int[Tensor, " b"] | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> AttentionState:
    """Attend to quantised heads: attention, in float64, to what they stand for.

    Args:
        q: Queries ``[b, h, m, d]``.
        k: Keys ``[b, g, n, d]``, in blocks of their own size, as the values.
        v: Values ``[b, g, n, e]``.
        mask: See `attention`, as for the rest.
        scale: Multiplies ``q · k`` of what the numbers stand for; 1/√d by default.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        q_offset: See `attention`.
        k_offset: See `attention`.
        out_dtype: Dtype of ``out``, which the inputs do not tell.

    Returns:
        ``out``, and ``lse`` in float32 (float64 where ``out`` is).

    Raises:
        ValueError: As `attention` and `dequantise`.
    """
    check_quantised(q=q, k=k, v=v)
    heads = [dequantise(x) for x in (q, k, v)]
    state = attention(
        *heads, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    return AttentionState(state.out, state.lse.to(floating(state.out)))


def blocks_of(n: int, block: int | None) -> tuple[int, int]:
    """Tokens of a block of n, and how many blocks there are."""
    return (max(n, 1), 1) if block is None else (block, -(-n // block))


def by_token(scale: Float32[Tensor, "b h t"], n: int, block: int | None) -> Float32[Tensor, "b h n 1"]:
    """Scale of every token."""
    return repeat(scale, "b h t -> b h (t size) 1", size=blocks_of(n, block)[0])[:, :, :n]


def check_quantised(**given: object) -> None:
    """Refuse numbers that are not e4m3, and scales that do not fit them."""
    for name, x in given.items():
        if not isinstance(x, Quantised):
            refuse(name, "Quantised(values, scale, block)", type(x).__name__)
            continue
        check_tensors(values=x.values, scale=x.scale)
        same_device(values=x.values, scale=x.scale)
        if x.values.ndim != 4 or x.values.dtype != E4M3:
            refuse(f"values of {name}", "float8_e4m3fn [b, h, n, d]", f"{x.values.dtype} {list(x.values.shape)}")
        if x.block is not None:
            check_count(f"block of {name}", x.block, 1)
        b, h, n, _ = x.values.shape
        shape = [b, h, blocks_of(n, x.block)[1]]
        if list(x.scale.shape) != shape or x.scale.dtype != torch.float32:
            refuse(f"scale of {name}", f"float32 {shape}", f"{x.scale.dtype} {list(x.scale.shape)}")
