"""Paged attention of `flash` against exact attention in float64: any pages, any ragged batch, any cut of the work."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.backends.flash import paged_launch
from longspan.backends.flash.decode_choices import PagedChoice, PagedKey, choose_paged
from longspan.laws.budget import attention_bounds, worst
from longspan.spec import AttentionState, masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
few = settings(max_examples=12 if DEVICE == "cpu" else 60)

Lengths = list[tuple[int, int]]
QUERIES = st.sampled_from([0, 1, 1, 2, 5, 17, 33])
KEYS = st.sampled_from([0, 1, 7, 16, 33, 64, 70])
MASKS = st.sampled_from(
    ["everything()", "causal()", "window(9)", "causal() & window(20, keep_first=3)", "prefix(12)",
     "window(5, ahead=2, keep_first=40)", "prefix(12) & window(30, ahead=4)", "chunks(7) & causal()",
     "chunks(6) & chunks(10)"]
)  # fmt: skip
CHOICES = st.builds(
    PagedChoice, tile_m=st.sampled_from([16, 32]), tile_n=st.sampled_from([16, 32]), num_warps=st.just(4),
    num_stages=st.just(1), wanted=st.sampled_from([1, 2, 5, 40]), least=st.sampled_from([1, 2]),
    descriptors=st.booleans(),
)  # fmt: skip


@contextmanager
def cut(choice: PagedChoice) -> Iterator[None]:
    """Launch with one choice."""
    with pytest.MonkeyPatch.context() as patch:
        fits = choice.descriptors and choice.tile_n
        patch.setattr(
            paged_launch,
            "choose_paged",
            lambda key: replace(choice, descriptors=key.descriptors and bool(fits) and key.page % fits == 0),
        )
        yield


class Cache:
    """Ragged queries and a pool of pages in random order, NaN where no sequence has a key."""

    def __init__(self, sizes: Lengths, page: int, *, dtype: str = "float32", index: str = "int32", tail: int = 0,
                 slices: bool = False, seed: int = 0, h: int = 4, g: int = 2, d: int = 16, e: int = 24,
                 ) -> None:  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        kind, count = getattr(torch, dtype), getattr(torch, index)
        self.q_lengths, self.lengths = (torch.tensor(x, dtype=count, device=DEVICE) for x in zip(*sizes, strict=True))
        self.q = torch.randn(sum(m for m, _ in sizes) + tail, h, d, generator=draw).to(kind).to(DEVICE)
        self.k, self.v = ([torch.randn(g, n, x, generator=draw).to(kind) for _, n in sizes] for x in (d, e))
        each = 1 + max(-(-n // page) for _, n in sizes)
        pages = each * len(sizes) + 1
        order = torch.randperm(pages, generator=draw)[: each * len(sizes)].view(len(sizes), each)
        self.k_pages, self.v_pages = (
            torch.full((pages, g + slices, page + 2 * slices, x + 8 * slices), torch.nan, dtype=kind)[
                :, :g, slices : page + slices, :x
            ]
            for x in (d, e)
        )
        for s, (_, n) in enumerate(sizes):
            for j in range(n):
                self.k_pages[order[s, j // page], :, j % page] = self.k[s][:, j]
                self.v_pages[order[s, j // page], :, j % page] = self.v[s][:, j]
        used = torch.arange(each) < -(-torch.tensor([n for _, n in sizes]) // page).unsqueeze(1)
        self.table = torch.where(used, order, 2**31 - 1).to(count).to(DEVICE)
        if slices:
            self.table = torch.stack([self.table, self.table - 1], dim=-1)[..., 0]
        if DEVICE != "cpu":
            self.k_pages, self.v_pages = self.k_pages.to(DEVICE), self.v_pages.to(DEVICE)
        self.sizes = sizes

    def attend(self, **options: Any) -> AttentionState:
        """Call the backend."""
        arguments = (self.q, self.q_lengths, self.k_pages, self.v_pages, self.table, self.lengths)
        assert flash.declines("attention_paged", *arguments, **options) is None
        return flash.attention_paged(*arguments, **options)

    def assert_exact(self, state: AttentionState, **options: Any) -> None:
        """Judge every sequence as if it were alone, and the tokens after the last as blind."""
        start = 0
        assert state.out.shape == (*self.q.shape[:2], self.v[0].shape[2])
        assert (state.out.dtype, state.lse.dtype) == (options.get("out_dtype") or self.q.dtype, torch.float32)
        for s, (m, _) in enumerate(self.sizes):
            q = self.q[start : start + m].transpose(0, 1)[None]
            bound = attention_bounds(q, self.k[s][None].to(DEVICE), self.v[s][None].to(DEVICE), **options)
            here = AttentionState(*(x[start : start + m].transpose(0, 1)[None] for x in state))
            assert worst("out", here.out, bound["out"]) <= 1
            assert worst("lse", here.lse, bound["lse"]) <= 1
            start += m
        sink = options.get("sink")
        rest = (
            torch.full_like(state.lse[start:], -torch.inf)
            if sink is None
            else sink.float().expand_as(state.lse[start:])
        )
        assert torch.equal(state.out[start:], torch.zeros_like(state.out[start:]))
        assert torch.equal(state.lse[start:], rest)


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    """Draw a cache of up to four sequences."""
    return Cache(
        draw(st.lists(st.tuples(QUERIES, KEYS), min_size=1, max_size=4), label="sizes"),
        draw(st.sampled_from([1, 5, 16, 24, 32, 64, 256]), label="page"),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"]), label="dtype"),
        index=draw(st.sampled_from(["int32", "int64"]), label="index"),
        slices=draw(st.booleans(), label="slices"), tail=draw(st.sampled_from([0, 0, 3]), label="tail"),
        seed=draw(st.integers(0, 2**31 - 1), label="seed"),
    )  # fmt: skip


@few
@given(caches(), MASKS, CHOICES, st.booleans())
def test_any_pages_and_any_cut_of_the_work_are_exact(cache: Cache, mask: str, choice: PagedChoice, rich: bool) -> None:
    options: dict[str, Any] = {"mask": eval(mask, vars(masks).copy())}  # noqa: S307 - our own source
    if rich:
        slopes = torch.tensor([1.0, 0.5, 0.25, 0.0], device=DEVICE)
        options |= {"sink": slopes - 0.3, "alibi": slopes, "softcap": 5.0, "scale": -0.3, "out_dtype": torch.float32}
    with cut(choice):
        cache.assert_exact(cache.attend(**options), **options)


def test_one_long_sequence_among_short_ones_is_split_and_merged() -> None:
    cache = Cache([(1, 3), (2, 600), (0, 9), (1, 1), (1, 0)], 16, seed=1, tail=1)
    choice = PagedChoice(tile_m=16, tile_n=16, num_warps=4, num_stages=1, wanted=9, least=1)
    with cut(choice):
        cache.assert_exact(cache.attend(mask=masks.causal()), mask=masks.causal())


def test_a_repeated_call_reads_the_tensors_that_it_is_given() -> None:
    for seed in range(5):
        cache = Cache([(1 + seed % 2, 40 + seed), (2 - seed % 2, 70 - seed)], 16, seed=seed)
        cache.assert_exact(cache.attend(mask=masks.causal()), mask=masks.causal())


def test_wide_heads_whose_values_are_their_keys_are_read_once() -> None:
    cache = Cache([(1, 40), (2, 9)], 16, h=16, g=1, d=320, e=256)
    cache.v = [k[..., :256] for k in cache.k]
    cache.v_pages = cache.k_pages[..., :256]
    cache.assert_exact(cache.attend(mask=masks.causal()), mask=masks.causal())


def test_pages_out_of_the_window_may_have_been_given_away() -> None:
    cache = Cache([(1, 70), (2, 64)], 8)
    near = masks.causal() & masks.window(9, keep_first=4)
    expected = cache.attend(mask=near)
    cache.k_pages[cache.table[0, 1].long()] = torch.nan
    cache.v_pages[cache.table[0, 1].long()] = torch.nan
    found = cache.attend(mask=near)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize(("sizes", "tokens"), [([(0, 5)], 0), ([(3, 0)], 3), ([(0, 0), (2, 2)], 2)])
def test_sequences_without_queries_or_keys(sizes: Lengths, tokens: int) -> None:
    cache = Cache(sizes, 16)
    state = cache.attend()
    assert state.out.shape == (tokens, 4, 24)
    cache.assert_exact(state)


def test_no_sequence_at_all_leaves_every_token_blind() -> None:
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    pool = torch.zeros(0, 2, 16, 8, device=DEVICE)
    state = flash.attention_paged(torch.ones(3, 4, 8, device=DEVICE), none, pool, pool, none.view(0, 1), none)
    assert torch.equal(state.out, torch.zeros_like(state.out))
    assert torch.equal(state.lse, torch.full_like(state.lse, -torch.inf))


def test_what_is_not_served_is_declined_by_name() -> None:
    cache = Cache([(1, 5)], 16)
    rest = (cache.q_lengths, cache.k_pages, cache.v_pages, cache.table, cache.lengths)
    refused: list[tuple[Tensor, dict[str, Any], str]] = [
        (cache.q.clone().requires_grad_(), {}, "no gradient"),
        (cache.q, {"sink": torch.zeros(4, device=DEVICE, requires_grad=True)}, "no gradient"),
        (cache.q, {"out_dtype": torch.float64}, "out_dtype"),
        (torch.cat([cache.q, cache.q], -1)[..., ::2], {}, "last stride"),
    ]
    for q, options, words in refused:
        reason = flash.declines("attention_paged", q, *rest, **options)
        assert reason is not None
        assert words in reason
        with pytest.raises(Unsupported, match=words):
            flash.attention_paged(q, *rest, **options)
    with torch.no_grad():
        assert flash.declines("attention_paged", cache.q.clone().requires_grad_(), *rest) is None


@pytest.mark.parametrize("name", ["lengths([5])", "documents([1])", "spans(torch.zeros(1).int(), torch.ones(1).int())"])
def test_masks_that_mean_nothing_here_are_refused_as_by_the_specification(name: str) -> None:
    cache = Cache([(1, 5)], 16)
    arguments = (cache.q, cache.q_lengths, cache.k_pages, cache.v_pages, cache.table, cache.lengths)
    mask = eval(name, {**vars(masks), "torch": torch})  # noqa: S307 - our own source
    for of in (spec, flash):
        with pytest.raises(ValueError, match=r"documents|spans"):
            of.attention_paged(*arguments, mask=mask)


@pytest.mark.skipif(DEVICE != "cpu", reason="reading a table back would stall a GPU")
@pytest.mark.parametrize(("entry", "length"), [(9, 5), (-1, 5), (0, 33), (0, -1)])
def test_a_table_that_does_not_hold_its_lengths_is_refused_where_it_can_be_read(entry: int, length: int) -> None:
    pool, one = torch.zeros(2, 1, 16, 8), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="must be 0 to"):
        flash.attention_paged(torch.zeros(1, 1, 8), one, pool, pool, one[None] * entry, one * length)


def test_a_choice_never_exceeds_its_workspace_bound() -> None:
    for sequences, rows, keys in ((1, 4, 100), (256, 1024, 8192), (64, 256, 131072), (3, 40000, 40000)):
        key = PagedKey(
            architecture="sm_90", processors=132, sequences=sequences, heads=8, rows=rows, keys=keys, page=64,
            width=128, itemsize=2,
        )  # fmt: skip
        choice = choose_paged(key)
        assert 1 <= choice.wanted <= 256
        assert 2 * choice.wanted * 8 * choice.tile_m * 128 * 4 < 2**27


# In a process of its own, since no compiler looks through the checks of shapes that this suite adds to the spec.
COMPILED = """
import torch
from longspan.backends import flash
from longspan.spec import masks
device = "cuda" if torch.cuda.is_available() else "cpu"
draw = torch.Generator().manual_seed(0)
q, pool = (torch.randn(*shape, generator=draw).to(device) for shape in ((4, 4, 16), (5, 2, 16, 16)))
table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32, device=device)
counts, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([1, 3], [20, 32]))
def attend(q, counts, pool, table, lengths):
    mask = masks.causal() & masks.window(9)
    state = flash.attention_paged(q, counts, pool, pool, table, lengths, mask=mask, softcap=2.0)
    return state.out * 2, state.lse
expected = attend(q, counts, pool, table, lengths)
found = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, counts, pool, table, lengths)
assert all(torch.equal(x, y) for x, y in zip(found, expected))
print("equal")
"""


def test_a_compiled_graph_holds_the_operator() -> None:
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.stdout.strip() == "equal", child.stderr[-3000:]


def test_the_operator_keeps_what_it_promises_to_the_compiler() -> None:
    cache = Cache([(1, 20), (2, 9)], 16)
    arguments = (cache.q, cache.q_lengths, cache.k_pages, cache.v_pages, cache.table, cache.lengths)
    rest = (*arguments, None, None, [-(2**30), 1, -1, 0], 0.25, None, torch.float32)
    checks = ("test_schema", "test_faketensor")
    # schema checks compare arguments before and after, which NaN never pass
    clean = [x.nan_to_num() if x.is_floating_point() else x for x in rest[:6]]
    torch.library.opcheck(torch.ops.longspan.flash_attention_paged, (*clean, *rest[6:]), test_utils=checks)
