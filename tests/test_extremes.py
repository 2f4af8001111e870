"""Where indices overflow: tensors of more than 2^31 elements, and a million tokens, exact on sampled rows.

A row costs O(n) to check in float64. Where the gradient of out is zero but on sampled rows, these are all that the
gradients of the keys know, so that they are exact over every key.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longspan import backends, spec
from longspan.backends import flash
from longspan.laws.budget import attention_bounds, worst
from longspan.laws.rotation import bound
from longspan.laws.states import merged_bound
from longspan.spec import AttentionState, masks

GIB = 2**30
MEMORY = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(MEMORY < 60 * GIB, reason="needs a GPU with 60 GB of memory")
BRAIN = torch.bfloat16
NAMES = [name for name in ("hopper", "flash") if name in backends.available()]
every_backend = pytest.mark.parametrize("name", NAMES)
TOKENS = 2**20 + 64  # of 16 heads of 128 coordinates: 131072 elements beyond 2^31


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Give memory back: these tests take a good part of it."""
    yield
    torch.cuda.empty_cache()


def drawn(*shape: int) -> Tensor:
    """Draw a tensor where it is to lie."""
    return torch.randn(shape, dtype=BRAIN, device="cuda", generator=torch.Generator("cuda").manual_seed(sum(shape)))


def swapped(*shape: int) -> Tensor:
    """Draw a tensor whose heads lie inside its tokens."""
    b, h, m, d = shape
    return drawn(b, m, h, d).transpose(1, 2)


def assert_exact(found: dict[str, Tensor], bounds: dict) -> None:
    """Hold what was found to its bounds."""
    for name, x in found.items():
        assert worst(name, x, bounds[name]) <= 1


@every_backend
def test_attention_beyond_32_bits_is_exact_forward_and_backward(name: str) -> None:
    backend = backends.load(name)
    q, k, v = drawn(1, 16, TOKENS, 128), swapped(1, 16, TOKENS, 128), swapped(1, 16, TOKENS, 128)
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    state = backend.attention(q, k, v, mask=masks.causal() & masks.window(300))
    samples = {0: [0, 1, 500], 15: [2**20 - 1, 2**20, TOKENS - 2, TOKENS - 1]}  # head: rows
    d_out = torch.zeros_like(state.out)
    for head, rows in samples.items():
        d_out[:, head, rows] = drawn(1, len(rows), 128)
    dq, dk, dv = torch.autograd.grad(state.out, leaves, d_out)
    with torch.no_grad():
        for head, rows in samples.items():
            one, begin = slice(head, head + 1), max(rows[0] - 299, 0)
            keys = slice(begin, rows[-1] + 1)
            last = torch.tensor(rows) + 1 - begin
            bounds = attention_bounds(
                q[:, one, rows], k[:, one, keys], v[:, one, keys],
                d_out=d_out[:, one, rows], mask=masks.spans((last - 300).clamp(min=0), last),
            )  # fmt: skip
            found = {
                "out": state.out[:, one, rows],
                "lse": state.lse[:, one, rows],
                "dq": dq[:, one, rows],
                "dk": dk[:, one, keys],
                "dv": dv[:, one, keys],
            }
            assert_exact(found, bounds)
        assert dk[:, 1:15].count_nonzero() == 0
        assert dq[:, 15, : 2**20 - 1].count_nonzero() == 0


@every_backend
def test_a_million_causal_tokens_in_one_call_are_exact_forward_and_backward(name: str) -> None:
    backend = backends.load(name)
    n = 2**20
    q, k, v = drawn(1, 2, n, 128), drawn(1, 1, n, 128), drawn(1, 1, n, 128)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    state = backend.attention(q, k, v, mask=masks.causal())
    rows = [0, 1, 4095, 65_536, 524_287, n - 2, n - 1]
    d_out = torch.zeros_like(state.out)
    d_out[:, :, rows] = drawn(1, 2, len(rows), 128)
    dq, dk, dv = torch.autograd.grad(state.out, leaves, d_out)
    seen = masks.spans(torch.zeros(len(rows), dtype=torch.int64), torch.tensor(rows) + 1)
    with torch.no_grad():
        bounds = attention_bounds(q[:, :, rows], k, v, d_out=d_out[:, :, rows], mask=seen)
        found = {"out": state.out[:, :, rows], "lse": state.lse[:, :, rows], "dq": dq[:, :, rows], "dk": dk, "dv": dv}
        assert_exact(found, bounds)


@every_backend
def test_one_query_of_two_million_keys_is_exact(name: str) -> None:
    backend = backends.load(name)
    n = 2**21 + 64
    q, k, v = drawn(1, 16, 1, 128), drawn(1, 8, n, 128), swapped(1, 8, n, 128)
    assert k.numel() > 2**31
    state = backend.attention(q, k, v, mask=masks.causal())
    for group in (0, 7):  # one head of keys at a time: in float64 the rest would not fit
        heads, key = slice(2 * group, 2 * group + 2), slice(group, group + 1)
        bounds = attention_bounds(q[:, heads], k[:, key], v[:, key])
        assert_exact({"out": state.out[:, heads], "lse": state.lse[:, heads]}, bounds)


@every_backend
def test_pages_beyond_32_bits_are_read(name: str) -> None:
    backend = backends.load(name)
    pages, page = 2**15 + 8, 64
    k_pages, v_pages = drawn(pages, 8, page, 128), drawn(pages, 8, page, 128)
    assert k_pages.numel() > 2**31
    lengths = torch.tensor([500, 130], dtype=torch.int32)
    table = torch.tensor([[pages - 1 - i for i in range(8)], [pages - 9, 3, pages - 10, *[2**31 - 1] * 5]])
    q, q_lengths = drawn(3, 16, 128), torch.tensor([2, 1])
    arguments = (q, q_lengths.cuda(), k_pages, v_pages, table.to("cuda", torch.int32), lengths.cuda())
    if backend.declines("attention_paged", *arguments, mask=masks.causal()) is not None:
        pytest.skip(f"{name} does not serve pages")
    state = backend.attention_paged(*arguments, mask=masks.causal())
    for sequence, queries in enumerate((slice(0, 2), slice(2, 3))):
        length = int(lengths[sequence])
        places = table[sequence, : -(-length // page)].cuda()
        k, v = (x[places].transpose(0, 1).flatten(1, 2)[None, :, :length] for x in (k_pages, v_pages))
        bounds = attention_bounds(q[queries].transpose(0, 1)[None], k, v, mask=masks.causal())
        found = {"out": state.out[queries].transpose(0, 1)[None], "lse": state.lse[queries].transpose(0, 1)[None]}
        assert_exact(found, bounds)


@pytest.mark.parametrize("inside", [False, True], ids=["heads outside", "heads inside"])
def test_rotation_beyond_32_bits_is_exact(inside: bool) -> None:
    x = swapped(1, 16, TOKENS, 128) if inside else drawn(1, 16, TOKENS, 128)
    assert x.numel() > 2**31
    position = torch.arange(TOKENS, device="cuda") + 2**31 - 1 - TOKENS
    rotation = spec.Rotation(spec.inv_freq(128, device="cuda"))
    turned = flash.rotate(x, position, rotation)
    rows = [0, 1, 12_345, 2**20 - 1, 2**20, TOKENS - 1]
    truth = bound(x[:, :, rows], position[rows], rotation, "half")
    assert worst("rotate", turned[:, :, rows], truth) <= 1


def test_appending_beyond_32_bits_writes_every_slot() -> None:
    tokens = 2**21 + 64
    k, v = drawn(tokens, 8, 128), drawn(tokens, 8, 128)
    assert k.numel() > 2**31
    k_cache, v_cache = (torch.zeros(tokens // 64 + 1, 8, 64, 128, dtype=BRAIN, device="cuda") for _ in range(2))
    caches = (k_cache, v_cache)
    slot = torch.arange(tokens, device="cuda").flip(0)
    rotation, position = spec.Rotation(spec.inv_freq(128, device="cuda")), torch.arange(tokens, device="cuda")
    flash.append_(k, v, k_cache, v_cache, slot, position=position, rotation=rotation)
    rows = torch.tensor([0, 1, 999_999, 2**21 - 1, tokens - 1], device="cuda")
    written = [cache[slot[rows] // 64, :, slot[rows] % 64] for cache in caches]
    assert torch.equal(written[1], v[rows])
    heads = k[rows].transpose(0, 1)[None]
    truth = bound(heads, position[rows], rotation, "half")
    assert worst("the key cache", written[0].transpose(0, 1)[None], truth) <= 1
    for cache in caches:
        assert cache[-1].count_nonzero() == 0
        assert bool((cache[: tokens // 64].view(-1, 128).count_nonzero(-1) > 0).all())


def test_a_merge_beyond_32_bits_is_exact() -> None:
    outs = drawn(1, 16, TOKENS, 128), swapped(1, 16, TOKENS, 128)
    states = [AttentionState(out, out[..., 0].float()) for out in outs]
    merged = flash.merge(*states)
    whole = flash.add_sink(merged, torch.ones(16, device="cuda"))
    rows = [0, 77, 2**20 - 1, 2**20, TOKENS - 1]
    few = [AttentionState(state.out[:, :, rows], state.lse[:, :, rows]) for state in states]
    bounds = merged_bound(few)
    assert_exact({"out": merged.out[:, :, rows], "lse": merged.lse[:, :, rows]}, bounds)
    part = AttentionState(merged.out[:, :, rows], merged.lse[:, :, rows])
    sink = AttentionState(torch.zeros_like(part.out), torch.ones_like(part.lse))
    assert_exact({"out": whole.out[:, :, rows], "lse": whole.lse[:, :, rows]}, merged_bound([part, sink]))
