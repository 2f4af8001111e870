"""A small problem for every kernel of `flash` and of `hopper`, plain and rich: compiled, sanitised, captured.

A case prepares its tensors on a device and returns the call, which can then be made any number of times. What it
launches is found by `longspan.laws.kernels.launches`; tests fail by name for a kernel that no case launches.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor

from longspan.backends import Unsupported
from longspan.spec import AttentionState, Rotation, inv_freq, masks
from longspan.spec.masks import Mask

Case = Callable[[Any, torch.device | str], Callable[[], list[Tensor]]]
"""Takes the backend and a device; returns the call, which returns all that the kernels wrote."""


def normal(*shape: int, dtype: torch.dtype, device: torch.device | str, inside: bool = True) -> Tensor:
    """Draw [b, heads, tokens, d] with the heads of a token side by side, as projections leave them, or outside."""
    draw = torch.Generator().manual_seed(sum(shape))
    if not inside:
        return torch.randn(shape, generator=draw).to(dtype).to(device)
    b, heads, tokens, d = shape
    return torch.randn(b, tokens, heads, d, generator=draw).to(dtype).to(device).transpose(1, 2)


def interpreted(backend: Any) -> bool:
    """Whether a backend's kernels run as Python, on problems that must then be small."""
    return getattr(backend, "INTERPRETED", False)


def packed(tokens: int, device: torch.device | str) -> Mask:
    """Two documents, neither of which has as many queries as keys, and tokens that belong to none."""
    q_lengths, k_lengths = ((tokens // 2 + more, tokens // 2 - 2) for more in (-5, 2))
    both = (torch.tensor(lengths, device=device) for lengths in (q_lengths, k_lengths))
    return masks.documents(*both) & masks.causal() & masks.window(7, keep_first=3)


def attention(
    d: int, e: int, dtype: torch.dtype, *, tokens: int = 130, rich: bool = False, deterministic: bool = False
) -> Case:
    """Prepare causal attention and its gradient; rich is packed, has every option, and a gradient of lse.

    By default there are more tokens than a tile has, so that the last one is cut.
    """

    def prepare(flash: Any, device: torch.device | str) -> Callable[[], list[Tensor]]:
        count, groups = (40, 1) if interpreted(flash) else (tokens, 2)
        mask = packed(count, device) if rich else masks.causal()
        heads = 2 * groups
        shapes = ((heads, d), (groups, d), (groups, e))
        q, k, v = (normal(2, h, count, w, dtype=dtype, device=device).requires_grad_() for h, w in shapes)
        leaves: list[Tensor] = [q, k, v]
        options: dict[str, Any] = {"deterministic": deterministic}
        if rich:
            sink, alibi = (torch.linspace(-1, 1, heads, device=device), torch.full((heads,), 0.1, device=device))
            leaves.append(sink.requires_grad_())
            options |= {"sink": sink, "alibi": alibi, "softcap": 5.0, "scale": -0.2}

        def run() -> list[Tensor]:
            state = flash.attention(q, k, v, mask=mask, **options)
            outputs = [state.out, state.lse] if rich else [state.out]
            grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
            return [*(x.detach() for x in state), *grads]

        return run

    return prepare


def decode(d: int, e: int, dtype: torch.dtype, m: int, n: int, *, rich: bool = False, lengths: bool = False) -> Case:
    """Prepare a few queries against a long cache, of which sequences may have filled a part."""

    def prepare(flash: Any, device: torch.device | str) -> Callable[[], list[Tensor]]:
        keys = n // 8 if interpreted(flash) else n
        q, k, v = (
            normal(2, h, t, w, dtype=dtype, device=device, inside=False)
            for h, t, w in ((8, m, d), (2, keys, d), (2, keys, e))
        )
        options: dict[str, Any] = {"mask": masks.causal()}
        filled = masks.lengths(torch.tensor([keys - 3, keys // 2], device=device))
        if lengths:
            options = {"mask": masks.causal() & filled}
        if rich:
            sink, alibi = (torch.full((8,), x, device=device) for x in (0.5, 0.1))
            mask = masks.causal() & masks.window(keys // 2, keep_first=4) & filled
            options = {"mask": mask, "sink": sink, "alibi": alibi, "softcap": 5.0}

        def run() -> list[Tensor]:
            with suppress(Unsupported), torch.no_grad():
                return list(flash.attention(q, k, v, **options))
            return []

        return run

    return prepare


def paged(d: int, dtype: torch.dtype, page: int, q_lengths: list[int], k_lengths: list[int], *, rich: bool) -> Case:
    """Prepare queries of several sequences against a paged cache."""

    def prepare(flash: Any, device: torch.device | str) -> Callable[[], list[Tensor]]:
        each = max(-(-length // page) for length in k_lengths)
        pages = len(k_lengths) * each
        q = normal(1, 8, sum(q_lengths), d, dtype=dtype, device=device)[0].transpose(0, 1)
        k_pages, v_pages = (normal(pages, 2, page, d, dtype=dtype, device=device, inside=False) for _ in range(2))
        table = torch.arange(pages, dtype=torch.int32).flip(0).view(len(k_lengths), each).to(device)
        lengths = torch.tensor(q_lengths, device=device), torch.tensor(k_lengths, dtype=torch.int32, device=device)
        options: dict[str, Any] = {"mask": masks.causal()}
        if rich:
            options = {"mask": masks.causal() & masks.window(20), "sink": torch.ones(8, device=device), "softcap": 5.0}

        def run() -> list[Tensor]:
            with suppress(Unsupported), torch.no_grad():
                return list(flash.attention_paged(q, lengths[0], k_pages, v_pages, table, lengths[1], **options))
            return []

        return run

    return prepare


def turning(d: int, dtype: torch.dtype, *, rich: bool) -> Case:
    """Prepare a rotation of queries and keys, and of their gradients; rich is partial, on three axes, row by row."""

    def prepare(flash: Any, device: torch.device | str) -> Callable[[], list[Tensor]]:
        q, k = (normal(2, h, 70, d, dtype=dtype, device=device, inside=not rich).requires_grad_() for h in (4, 2))
        speed = inv_freq(d - 16 if rich else d, device=device)
        rotation, position = Rotation(speed), torch.arange(70, device=device)
        if rich:
            axis = torch.arange(speed.shape[0], device=device) % 3
            factor = torch.tensor([1.0, 1.25], dtype=torch.float64, device=device)
            rotation = Rotation(torch.stack([speed, speed / 2]), factor, axis=axis)
            position = (2**29 + torch.arange(3 * 2 * 70, device=device)).view(3, 2, 70)

        def run() -> list[Tensor]:
            turned = flash.rotate_qk(q, k, position, rotation, pairing="interleaved" if rich else "half")
            grads = torch.autograd.grad(turned, [q, k], [torch.ones_like(x) for x in turned])
            return [*(x.detach() for x in turned), *grads]

        return run

    return prepare


def appending(d: int, e: int, dtype: torch.dtype, *, rich: bool) -> Case:
    """Prepare new tokens for a cache; rich turns them, in part and interleaved."""

    def prepare(flash: Any, device: torch.device | str) -> Callable[[], list[Tensor]]:
        k, v = (normal(1, 2, 30, w, dtype=dtype, device=device)[0].transpose(0, 1) for w in (d, e))
        slot = torch.arange(31, 1, -1, device=device)
        slot[3] = -1
        rotation = Rotation(inv_freq(d - 16 if rich else d, device=device), 1.25)
        caches = [torch.zeros(3, 2, 16, w, dtype=dtype, device=device) for w in (d, e)]

        def run() -> list[Tensor]:
            flash.append_(
                k, v, *caches, slot, position=slot, rotation=rotation, pairing="interleaved" if rich else "half"
            )
            return caches

        return run

    return prepare


def merging(parts: int, e: int, dtype: torch.dtype, *, rich: bool) -> Case:
    """Prepare a merge of parts, some of their rows empty; rich adds a sink to it."""

    def prepare(flash: Any, device: torch.device | str) -> Callable[[], list[Tensor]]:
        outs = [normal(2, 4, 33, e, dtype=dtype, device=device, inside=part % 2 == 0) for part in range(parts)]
        lses = [x[..., 0].float().masked_fill(x[..., 0] < -1, -torch.inf) for x in outs]
        states = [AttentionState(*state) for state in zip(outs, lses, strict=True)]
        sink = torch.linspace(-1, 1, 4, device=device)

        def run() -> list[Tensor]:
            state = flash.merge(*states)
            return [*state, *(flash.add_sink(state, sink) if rich else ())]

        return run

    return prepare


HALF: Final = torch.float16
BRAIN: Final = torch.bfloat16
SINGLE: Final = torch.float32

CASES: Final[dict[str, Case]] = {
    "attention, plain": attention(128, 128, BRAIN),
    "attention, rich": attention(80, 96, HALF, rich=True),
    "decode, plain": decode(128, 128, BRAIN, 1, 1040),
    "decode, rich": decode(64, 64, HALF, 3, 600, rich=True),
    "decode, lengths": decode(64, 64, HALF, 2, 600, lengths=True),
    "paged, plain": paged(128, BRAIN, 64, [1, 1], [80, 130], rich=False),
    "paged, rich": paged(80, HALF, 16, [5, 2], [40, 33], rich=True),
    "rotation, plain": turning(128, BRAIN, rich=False),
    "rotation, rich": turning(80, SINGLE, rich=True),
    "append, plain": appending(128, 128, BRAIN, rich=False),
    "append, rich": appending(96, 80, HALF, rich=True),
    "merge, plain": merging(3, 128, BRAIN, rich=False),
    "merge, rich": merging(2, 80, HALF, rich=True),
}
# Where registers and shared memory are scarcest; compiled for some machines only, because each takes seconds.
LARGE: Final[dict[str, Case]] = {
    "attention, wide": attention(256, 256, BRAIN),
    "attention, float32": attention(192, 128, SINGLE),
}
# Those of `hopper`, whose kernels differ by the heads' width: forward, and a backward that repeats bitwise.
HOPPER: Final[dict[str, Case]] = {
    f"attention {d}/{e}, {'rich' if rich else 'plain'}": attention(d, e, BRAIN, rich=rich, deterministic=True)
    for d, e in ((64, 64), (128, 128), (192, 128), (256, 256))
    for rich in (False, True)
}
# Gradients of queries that are summed in whatever order they come, by kernels of their own.
UNORDERED: Final[dict[str, Case]] = {f"attention {d}/{d}, in any order": attention(d, d, BRAIN) for d in (64, 128, 256)}
