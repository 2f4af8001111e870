"""Laws of ragged batches and caches: each is attention to what the batch or the cache stands for."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import Rotation, inv_freq

from .budget import Bound, attention_bounds, worst
from .calls import Device, compare
from .problems import Attention
from .rotation import bound as rotation_bound


class Ragged:
    """A ragged batch drawn from a problem: b sequences of up to m queries and n keys, one of them often empty."""

    def __init__(self, problem: Attention, device: Device) -> None:
        draw = torch.Generator().manual_seed(problem.seed)
        self.q_lengths = torch.randint(problem.m + 1, (problem.b,), generator=draw)
        self.k_lengths = torch.randint(problem.n + 1, (problem.b,), generator=draw)
        of = problem.inputs(device)
        self.options: dict[str, Any] = {
            name: x for name, x in of.options.items() if name not in {"mask", "q_offset", "k_offset"}
        }
        self.mask = problem.build_mask()
        self.q, self.k, self.v = of.q, of.k, of.v
        self.device = device

    def packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Lay sequences one after the other, [tokens, heads, dim]."""
        rows = [rearrange(row[:, :length], "h t d -> t h d") for row, length in zip(x, lengths.tolist(), strict=True)]
        return torch.cat(rows)

    def bound(self) -> dict[str, Bound]:
        """Bound the whole batch by bounding each sequence alone."""
        bounds = [
            attention_bounds(q[None, :, :a], k[None, :, :c], v[None, :, :c], mask=self.mask, **self.options)
            for q, k, v, a, c in zip(
                self.q, self.k, self.v, self.q_lengths.tolist(), self.k_lengths.tolist(), strict=True
            )
        ]

        def joined(name: str, pattern: str) -> Bound:
            sides = zip(*(x[name] for x in bounds), strict=True)
            return Bound(*(torch.cat([rearrange(x, pattern) for x in side]) for side in sides))

        return {"out": joined("out", "1 h m e -> m h e"), "lse": joined("lse", "1 h m -> m h")}


def ragged_batches_are_separate_sequences(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Each sequence of a ragged batch attends as if it were alone."""
    of = Ragged(problem, device)
    state = backend.attention_varlen(
        of.packed(of.q, of.q_lengths), of.packed(of.k, of.k_lengths), of.packed(of.v, of.k_lengths),
        of.q_lengths.to(device), of.k_lengths.to(device), mask=of.mask, **of.options,
    )  # fmt: skip
    return compare(state, of.bound())


def pages_are_gathered_keys(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Keys scattered over pages, in any order, are the keys laid out in a row; free pages may hold NaN."""
    of = Ragged(problem, device)
    size = (16, 32, 64, 128)[problem.seed % 4]
    pages = -(-problem.n // size)
    draw = torch.Generator().manual_seed(problem.seed + 1)
    table = torch.randperm(problem.b * pages + 2, generator=draw)[: problem.b * pages]
    table = rearrange(table, "(b t) -> b t", b=problem.b)

    def pool(x: Tensor) -> Tensor:
        room = torch.full((problem.b * pages + 2, x.shape[1], size, x.shape[3]), torch.nan, dtype=x.dtype)
        for b in range(problem.b):
            for j in range(int(of.k_lengths[b])):
                room[table[b, j // size], :, j % size] = x[b, :, j].cpu()
        return room.to(device)

    # Entries past a sequence's pages are never read: point them outside the pool.
    used = torch.arange(pages) < rearrange(-(-of.k_lengths // size), "b -> b 1")
    state = backend.attention_paged(
        of.packed(of.q, of.q_lengths), of.q_lengths.to(device), pool(of.k), pool(of.v),
        torch.where(used, table, 2**31 - 1).to(torch.int32).to(device), of.k_lengths.to(torch.int32).to(device),
        mask=of.mask, **of.options,
    )  # fmt: skip
    return compare(state, of.bound())


def ragged_gradients_are_exact(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Gradients of a ragged batch are those of its sequences, each alone."""
    of = Ragged(problem, device)
    packed = [of.packed(x, n) for x, n in ((of.q, of.q_lengths), (of.k, of.k_lengths), (of.v, of.k_lengths))]
    leaves = [x.detach().requires_grad_() for x in packed]
    options = {**of.options, "out_dtype": None}
    state = backend.attention_varlen(*leaves, of.q_lengths.to(device), of.k_lengths.to(device), mask=of.mask, **options)
    draw = torch.Generator().manual_seed(problem.seed)
    d_out = torch.randn(state.out.shape, generator=draw, dtype=torch.float64).to(state.out.dtype).to(device)
    found = torch.autograd.grad(state.out, leaves, d_out)
    worst_error, start = 0.0, 0
    starts = {"dq": 0, "dk": 0, "dv": 0}
    for b, (m, n) in enumerate(zip(of.q_lengths.tolist(), of.k_lengths.tolist(), strict=True)):
        bound = attention_bounds(
            of.q[b : b + 1, :, :m], of.k[b : b + 1, :, :n], of.v[b : b + 1, :, :n],
            d_out=rearrange(d_out[start : start + m], "m h e -> 1 h m e"), mask=of.mask, **options,
        )  # fmt: skip
        for name, x, length in zip(starts, found, (m, n, n), strict=True):
            here = rearrange(x[starts[name] : starts[name] + length], "t h d -> 1 h t d")
            worst_error = max(worst_error, worst(name, here, bound[name]))
            starts[name] += length
        start += m
    return worst_error


def appending_is_concatenation(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """New tokens land in their slots, keys rotated, values bit for bit; skipped tokens and other slots stay."""
    of = problem.inputs(device)
    size, rows = 16, 3
    draw = torch.Generator().manual_seed(problem.seed)
    tokens = min(problem.n, rows * size)
    k, v = (rearrange(x[:1, :, :tokens], "1 g t d -> t g d") for x in (of.k, of.v))
    free = torch.randperm(rows * size, generator=draw)[:tokens]
    slot = torch.where(torch.rand(tokens, generator=draw) < 0.2, -1, free)
    position = torch.randint(2**20, (tokens,), generator=draw).to(device)
    planes = 1 + problem.seed % (problem.d // 2)
    rotation = Rotation(inv_freq(2 * planes), attention_factor=1.25).to(device) if problem.seed % 3 else None
    pairing = "half" if problem.seed % 2 else "interleaved"
    caches = [torch.randn(rows, problem.g, size, x.shape[-1], generator=draw).to(x.dtype).to(device) for x in (k, v)]
    before = [x.clone() for x in caches]
    turned = {} if rotation is None else {"position": position, "rotation": rotation, "pairing": pairing}
    backend.append_(k, v, *caches, slot.to(device), **turned)

    heads = rearrange(k, "t g d -> 1 g t d")
    bound = Bound(heads.double(), torch.zeros_like(heads, dtype=torch.float64))
    bound = bound if rotation is None else rotation_bound(heads, position, rotation, pairing)
    kept = slot >= 0
    where = slot[kept].to(device)

    def laid(into: Tensor, x: Tensor) -> Tensor:
        room = rearrange(into.double(), "r g c d -> (r c) g d").clone()
        room[where] = rearrange(x[:, :, kept.to(device)], "1 g t d -> t g d").double()
        return rearrange(room, "(r c) g d -> r g c d", c=size)

    keys = Bound(laid(before[0], bound.truth), laid(torch.zeros_like(before[0]), bound.budget))
    values = laid(before[1], rearrange(v, "t g e -> 1 g t e"))
    return max(worst("the key cache", caches[0], keys), worst("the value cache", caches[1], Bound(values, 0 * values)))
