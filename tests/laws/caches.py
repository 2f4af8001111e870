"""Laws of ragged batches and caches: each is attention to what the batch or the cache stands for."""

from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import AttentionState, Rotation, inv_freq

from .budget import Bound, attention_bounds, worst
from .calls import Device, compare, typed, watched
from .layout import lay, to
from .problems import Attention
from .rotation import bound as rotation_bound


class Ragged:
    """A ragged batch drawn from a problem: b sequences of up to m queries and n keys, one of them often empty.

    A few tokens may follow the last sequence: as queries they see nothing, as keys nobody sees them.
    """

    def __init__(self, problem: Attention, device: Device) -> None:
        draw = torch.Generator().manual_seed(problem.seed)
        q_lengths = torch.randint(problem.m + 1, (problem.b,), generator=draw)
        k_lengths = torch.randint(problem.n + 1, (problem.b,), generator=draw)
        self.tail = problem.seed % 3
        self.q_lengths, self.k_lengths = (x.to(getattr(torch, problem.index)) for x in (q_lengths, k_lengths))
        of = problem.inputs(device)
        self.options: dict[str, Any] = {
            name: x for name, x in of.options.items() if name not in {"mask", "q_offset", "k_offset"}
        }
        self.mask = problem.build_mask()
        self.q, self.k, self.v = of.q, of.k, of.v
        self.storage = problem.storage, problem.k_storage or problem.storage, problem.v_storage or problem.storage
        self.device = device

    def packed(self, x: Tensor, lengths: Tensor, storage: str = "bhmd", rest: float = 1.0) -> Tensor:
        """Lay sequences one after the other, [tokens, heads, dim], and after them tokens that are all ``rest``."""
        rows = [rearrange(row[:, :length], "h t d -> t h d") for row, length in zip(x, lengths.tolist(), strict=True)]
        return lay(torch.cat([*rows, x.new_full((self.tail, x.shape[1], x.shape[3]), rest)]), storage, 1)

    def arguments(self) -> tuple[Tensor, ...]:
        """Arguments of `attention_varlen`."""
        tensors = zip((self.q, self.k, self.v), (self.q_lengths, self.k_lengths, self.k_lengths), strict=True)
        rests = (1.0, torch.nan, torch.nan)
        packed = [self.packed(*x, *y) for x, y in zip(tensors, zip(self.storage, rests, strict=True), strict=True)]
        return *packed, self.q_lengths.to(self.device), self.k_lengths.to(self.device)

    def compare(self, state: AttentionState) -> float:
        """Compare the whole batch with its bound."""
        return compare(typed(state, self.q.dtype, self.options["out_dtype"]), self.bound())

    def bound(self) -> dict[str, Bound]:
        """Bound the whole batch by bounding each sequence alone; the tokens after the last see nothing."""
        bounds = [
            attention_bounds(q[None, :, :a], k[None, :, :c], v[None, :, :c], mask=self.mask, **self.options)
            for q, k, v, a, c in zip(
                self.q, self.k, self.v, self.q_lengths.tolist(), self.k_lengths.tolist(), strict=True
            )
        ]
        rest = self.q.new_ones(1, self.q.shape[1], self.tail, self.q.shape[3])
        bounds.append(attention_bounds(rest, self.k[:1, :, :0], self.v[:1, :, :0], **self.options))

        def joined(name: str, pattern: str) -> Bound:
            sides = zip(*(x[name] for x in bounds), strict=True)
            return Bound(*(torch.cat([rearrange(x, pattern) for x in side]) for side in sides))

        return {"out": joined("out", "1 h m e -> m h e"), "lse": joined("lse", "1 h m -> m h")}


def ragged_batches_are_separate_sequences(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Each sequence of a ragged batch attends as if it were alone, and tokens after the last see nothing."""
    of = Ragged(problem, device)
    return of.compare(watched(backend.attention_varlen, *of.arguments(), mask=of.mask, **of.options))


PAGES: Final = (16, 32, 48, 64, 128, 256)  # keys of a page


def pages_are_gathered_keys(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Keys scattered over pages, in any order, are the keys laid out in a row; free pages may hold NaN."""
    of = Ragged(problem, device)
    size = PAGES[problem.seed % len(PAGES)]
    pages = -(-problem.n // size)
    draw = torch.Generator().manual_seed(problem.seed + 1)
    table = torch.randperm(problem.b * pages + 2, generator=draw)[: problem.b * pages]
    table = rearrange(table, "(b t) -> b t", b=problem.b)

    def pool(x: Tensor, storage: str) -> Tensor:
        room = torch.full((problem.b * pages + 2, x.shape[1], size, x.shape[3]), torch.nan, dtype=x.dtype)
        for keys, row, length in zip(x.cpu(), table, of.k_lengths.tolist(), strict=True):
            j = torch.arange(length)
            room[row[j // size], :, j % size] = rearrange(keys[:, :length], "g n d -> n g d")
        return to(lay(room, "bhmd" if storage == "expand" else storage, len(room)), device)

    # Entries past a sequence's pages are never read: point them outside the pool.
    used = torch.arange(pages) < rearrange(-(-of.k_lengths // size), "b -> b 1")
    q, _, _, q_lengths, k_lengths = of.arguments()
    state = watched(
        backend.attention_paged, q, q_lengths, pool(of.k, of.storage[1]), pool(of.v, of.storage[2]),
        torch.where(used, table, 2**31 - 1).to(k_lengths.dtype).to(device), k_lengths,
        mask=of.mask, **of.options,
    )  # fmt: skip
    return of.compare(state)


def ragged_gradients_are_exact(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Gradients of a ragged batch are those of its sequences, each alone."""
    of = Ragged(problem, device)
    leaves = [x.detach().requires_grad_() for x in of.arguments()[:3]]
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
    for name, x in zip(starts, found, strict=True):
        assert not bool(x[starts[name] :].any()), f"{name} of tokens after the last sequence is not 0"
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
    caches = [torch.randn(rows, problem.g, size, x.shape[-1], generator=draw).to(x.dtype) for x in (k, v)]
    stored = ("bhmd" if x in {None, "expand"} else x for x in (problem.k_storage, problem.v_storage))
    caches = [to(lay(x, str(storage), rows), device) for x, storage in zip(caches, stored, strict=True)]
    before = [x.clone() for x in caches]
    around = [whole(x).clone() for x in caches]
    turned = {} if rotation is None else {"position": position, "rotation": rotation, "pairing": pairing}
    backend.append_(k, v, *caches, slot.to(getattr(torch, problem.index)).to(device), **turned)
    for cache, memory in zip(caches, around, strict=True):
        memory.as_strided(cache.shape, cache.stride(), cache.storage_offset()).copy_(cache)
        assert torch.equal(memory.nan_to_num(), whole(cache).nan_to_num()), "what lies around a cache was written to"

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


def whole(x: Tensor) -> Tensor:
    """All of the memory of which a tensor may be a slice."""
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
