"""How the tensors of a problem lie in memory: the values are drawn first, and laid out afterwards.

Shapes: any; an axis of sequences, if there is one, comes first, and coordinates come last.
"""

import torch
from torch import Tensor


def lay(x: Tensor, storage: str, b: int) -> Tensor:
    """Lay a tensor out as asked; its values do not change.

    Args:
        x: The values, ``[b or 1, heads, tokens, d]``, or ``[tokens, heads, d]`` of a ragged batch.
        storage: ``bhmd`` (in a row), ``bmhd`` (heads and tokens swapped), ``slice`` (of a wider tensor whose rest is
            NaN) or ``expand`` (one sequence that stands for the whole batch).
        b: Sequences of the batch.
    """
    heads, tokens = (1, 2) if x.ndim == 4 else (1, 0)
    match storage:
        case "bmhd":
            return x.transpose(heads, tokens).contiguous().transpose(heads, tokens)
        case "slice":
            shape = list(x.shape)
            shape[heads], shape[tokens], shape[-1] = shape[heads] + 1, shape[tokens] + 3, shape[-1] + 8
            inner = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device).narrow(tokens, 1, x.shape[tokens])
            inner = inner.narrow(heads, 0, x.shape[heads])[..., : x.shape[-1]]
            inner.copy_(x)
            return inner
        case "expand" if x.ndim == 4:
            return x.expand(b, *x.shape[1:])
        case _:
            return x


def lay_like(x: Tensor, like: Tensor) -> Tensor:
    """Give x the strides of another tensor of its shape."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(like.shape, like.stride(), strict=True))
    if not like.numel():
        return x
    room = torch.full((size,), torch.nan, dtype=x.dtype)
    laid = torch.as_strided(room, like.shape, like.stride())
    laid.copy_(x)
    return laid


def to(x: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor and keep its strides, the gaps of a slice included."""
    if torch.device(device).type == "cpu":
        return x
    size = (
        1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    )
    moved = torch.as_strided(x, (size,), (1,)).to(device)
    return torch.as_strided(moved, x.shape, x.stride()) if size else x.to(device)
