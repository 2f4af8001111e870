"""The tile arithmetic of hopper's backward kernels, as plain Python: what is visited, what is masked, who does what."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

tiles = pytest.importorskip("longspan.backends.hopper.backward_tiles", exc_type=ImportError)


def plain(function: Any) -> Callable[..., Any]:
    """Take a kernel's function for what it also is: Python, in which it calls others that are."""
    fn = function.fn
    names = {name: getattr(value, "fn", value) for name, value in fn.__globals__.items()}
    return type(fn)(fn.__code__, names, fn.__name__, fn.__defaults__)


@given(
    m=st.integers(1, 300), n=st.integers(1, 300), low=st.integers(-400, 40), size=st.integers(1, 430),
    stop=st.integers(0, 300), tile=st.sampled_from([(16, 32), (64, 64), (16, 64)]),
)  # fmt: skip
@example(m=256, n=256, low=-256, size=257, stop=256, tile=(64, 64))
def test_visits_every_tile_that_is_seen_no_other_and_masks_those_that_are_cut(
    m: int, n: int, low: int, size: int, stop: int, tile: tuple[int, int]
) -> None:
    stop, high, (tall, wide) = min(stop, n), low + size, tile
    seen = [[max(i + low, 0) <= j < min(i + high, stop) for j in range(n + wide)] for i in range(m)]
    for start in range(0, n, wide):
        first, last, full_first, full_last = plain(tiles.affine_sight)(start, m, low, high, stop, tall, wide)
        assert first <= full_first <= full_last <= last or first == last
        for row in range(0, m, tall):
            part = [any(seen[i][start : start + wide]) for i in range(row, min(row + tall, m))]
            whole = [all(seen[i][start : start + wide]) for i in range(row, min(row + tall, m))]
            assert (first <= row < last) == any(part)
            if full_first <= row < full_last:
                assert all(whole)
            elif first <= row < last and row + tall <= m:
                assert not all(whole)


@given(key_tiles=st.integers(1, 9), key_heads=st.integers(1, 5), batches=st.integers(1, 4), together=st.integers(1, 7))
def test_gives_every_tile_of_keys_to_one_program(key_tiles: int, key_heads: int, batches: int, together: int) -> None:
    given_out = [
        plain(tiles.assignment)(program, key_tiles, key_heads, batches, together)
        for program in range(key_tiles * key_heads * batches)
    ]
    assert sorted(given_out) == [
        (tile, head, batch) for tile in range(key_tiles) for head in range(key_heads) for batch in range(batches)
    ]


@given(
    low=st.integers(0, 3),
    body=st.integers(0, 3),
    gap=st.integers(0, 2),
    heads=st.integers(0, 3),
    group=st.integers(1, 3),
)
def test_walks_over_the_tiles_of_every_head_and_then_over_those_that_see_a_document_start(
    low: int, body: int, gap: int, heads: int, group: int
) -> None:
    size, keep = 64, True
    high = low + body
    head_low = high + gap
    bounds = [x * size for x in (low, high, head_low, head_low + heads)]
    start, line, visited = bounds[2] if body == 0 else bounds[0], 0, []
    for _ in range((body + heads) * group):
        visited.append((line, start // size))
        start, line = plain(tiles.advance)(start, line, *bounds, 1, size, keep)
    walk = [*range(low, high), *range(head_low, head_low + heads)]
    assert visited == [(line, tile) for line in range(group) for tile in walk]
