"""The whole numbers of `hopper`'s forward kernel: every tile of queries comes once, with the tiles of keys it needs."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.spec import bounds, masks, visible

tiles = pytest.importorskip("longspan.backends.hopper.tiles", exc_type=ImportError)
spans = pytest.importorskip("longspan.backends.hopper.spans", exc_type=ImportError)
choices = pytest.importorskip("longspan.backends.hopper.choices", exc_type=ImportError)
launch = pytest.importorskip("longspan.backends.hopper.launch", exc_type=ImportError)
lowering = pytest.importorskip("longspan.backends.flash.lowering", exc_type=ImportError)

SIZES = st.integers(1, 70)
Tiles = set[int]


def needed(see: torch.Tensor, size: int) -> tuple[Tiles, Tiles]:
    """Tiles of keys that some row sees part of, and those that every row sees whole; ``see`` is [rows, n]."""
    parts = see.split(size, dim=1)
    some = {t for t, part in enumerate(parts) if part.any()}
    return some, {t for t, part in enumerate(parts) if part.shape[1] == size and part.numel() and part.all()}


@given(SIZES, st.integers(1, 40), st.sampled_from([1, 4, 8]), st.booleans())
def test_every_tile_of_every_head_comes_once(count: int, heads: int, together: int, longest_first: bool) -> None:
    order = [tiles.place.fn(i, count, heads, together, longest_first) for i in range(count * heads)]
    assert sorted(order) == sorted((t, h) for t in range(count) for h in range(heads))
    groups = [h // together for _, h in order]
    assert groups == sorted(groups)
    if longest_first:
        for group in set(groups):
            down = [t for t, h in order if h // together == group]
            assert down == sorted(down, reverse=True)


@given(st.data())
def test_affine_masks_need_exactly_these_tiles_of_keys(data: st.DataObject) -> None:
    m, n, rows, size = (data.draw(SIZES, label=name) for name in ("m", "n", "rows", "size"))
    low, high = (data.draw(st.integers(-m, n), label=name) for name in ("low", "high"))
    stop, row = data.draw(st.integers(0, n), label="stop"), data.draw(st.integers(0, m + rows), label="row")
    first, last, full_first, full_last = tiles.keys_of.fn(row, m, low, high, stop, rows, size)
    i, j = torch.arange(m)[row : row + rows, None], torch.arange(n)[None, :]
    some, whole = needed((j >= (i + low).clamp(min=0)) & (j < (i + high).clamp(max=stop)), size)
    assert first <= full_first <= full_last <= last
    assert some <= set(range(first, last))
    if high > low:  # rows see something where there is anything, and what they see hangs together
        assert set(range(first, last)) == some or not some
    assert set(range(full_first, full_last)) == (whole & set(range(first, last)))


@given(st.integers(1, 500), st.integers(-9, 9), st.integers(0, 1), st.integers(0, 700), st.sampled_from([64, 128]))
def test_masks_that_cut_once_cut_the_last_tile_alone(m: int, whole: int, more: int, stop: int, size: int) -> None:
    low, high = -m, whole * choices.TALL + 1 + more
    once = choices.cut_once(m, low, high, stop, size)
    assert not more or not once
    assert once or more or stop < m - 1 + high
    for row in range(0, m, choices.TALL):
        first, last, full_first, full_last = tiles.keys_of.fn(row, m, low, high, stop, choices.TALL, size)
        assert full_first == first
        assert not once or last - full_last <= 1


@given(st.lists(st.integers(0, 9), min_size=6, max_size=6).map(sorted), st.booleans())
def test_a_warpgroup_stays_within_what_is_loaded_and_never_has_nothing(edges: list[int], empty: bool) -> None:
    outer_first, first, full_first, full_last, last, outer_last = edges
    if empty:
        first = full_first = full_last = last
    first, last, full_first, full_last = tiles.within.fn(first, last, full_first, full_last, outer_first, outer_last)
    assert outer_first <= first < last <= max(outer_last, outer_first + 1)
    assert first <= full_first <= full_last <= last


MASKS = (
    "documents([70, 0, 130], [60, 20, 150]) & causal()", "causal() & window(40, keep_first=9)", "chunks(37) & causal()",
    "prefix(50)", "documents([90, 80], [200, 10]) & window(30, keep_first=5)", "lengths([0, 0]) & prefix(0)",
    "documents([64, 64], [200, 1000]) & causal() & window(16, keep_first=40)",
)  # fmt: skip


@pytest.mark.parametrize("source", MASKS)
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_rows_of_bounds_need_these_tiles_of_keys(source: str, warpgroups: int) -> None:
    b, m, n, tall, wide = 2, 230, 260, 32, 16
    mask: Any = eval(source, {**vars(masks)})  # noqa: S307 - our own source
    seen = bounds(mask, b, m, n)
    rows = torch.stack([seen.first, seen.last, seen.base, seen.position]).to(torch.int32)
    call = launch.Call(None, None, rows, None, (-m, n, n, 0, seen.keep), 1.0, None, torch.float16)
    with launch.flash.quiet():
        plan = spans.spans(call, m, n, warpgroups, tall, wide)[0].tolist()
    see = visible(seen, n)
    for batch in range(b):
        for tile, (first, last, head_first, head_last, *own) in enumerate(plan[batch]):
            at = slice(tile * warpgroups * tall, (tile + 1) * warpgroups * tall)
            some, _ = needed(see[batch, at], wide)
            loaded = [*range(first, last), *range(head_first, head_last)]
            assert len(set(loaded)) == len(loaded) > 0
            assert some <= set(loaded)
            for w in range(warpgroups):
                own_first, own_last, full_first, full_last = own[4 * w : 4 * w + 4]
                start = at.start + w * tall
                mine, whole = needed(see[batch, start : start + tall], wide)
                heads = set(range(head_first, head_last))
                assert mine <= set(range(own_first, own_last)) | heads
                assert first <= own_first <= full_first <= full_last <= own_last <= last
                assert own_last > own_first or heads
                if start < m:
                    assert set(range(full_first, full_last)) <= whole


def test_packed_documents_load_no_tile_that_nobody_sees() -> None:
    b, m, n, mask = 1, 500, 500, masks.documents([200, 300], [200, 300]) & masks.causal()
    seen = lowering.lower(mask, b, m, n, q_offset=None, k_offset=0, device=torch.device("cpu"))
    call = launch.Call(None, None, seen.rows, None, tuple(seen.interval), 1.0, None, torch.float16)
    with launch.flash.quiet():
        plan = spans.spans(call, m, n, 2, 64, 32)[0]
    see = visible(bounds(mask, b, m, n), n)[0]
    exact = sum(len(needed(see[at : at + 128], 32)[0]) for at in range(0, m, 128))
    assert int((plan[..., 1] - plan[..., 0] + plan[..., 3] - plan[..., 2]).sum()) == exact
