"""Masks mean what their inequalities say, joined in any way, and lower to monotone bounds."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.laws.problems import Attention
from longspan.laws.strategies import attentions
from longspan.spec import bounds, masks, visible
from longspan.spec.masks import Causal, Chunks, Documents, Lengths, Mask, Prefix, Spans, Window


def place(mask: Mask, b: int, i: int, problem: Attention) -> tuple[int, int, int] | None:
    """Where query row i of sequence b stands: its document's first and last key position, and its own position."""
    total = problem.k_offset + problem.n
    for term in mask.terms:
        if isinstance(term, Documents):
            q_lengths, k_lengths = (x.expand(problem.b, -1)[b].tolist() for x in (term.q_lengths, term.k_lengths))
            starts = zip(q_lengths, k_lengths, accumulate(q_lengths), accumulate(k_lengths), strict=True)
            for q_length, k_length, q_stop, k_stop in starts:
                if q_stop - q_length <= i < q_stop:
                    return k_stop - k_length, k_stop, k_stop - q_stop + i
            return None
        if isinstance(term, Lengths):
            total = int(term.lengths[b])
    offset = problem.q_offset[b] if isinstance(problem.q_offset, tuple) else problem.q_offset
    return 0, total, i + (total - problem.m if offset is None else offset)


def shows(term: Any, i: int, j: int) -> bool:
    """The inequality of one term, in document coordinates."""
    match term:
        case Causal():
            return j <= i
        case Window(size, ahead, keep_first):
            return (i - size < j or j < keep_first) and j <= i + ahead
        case Prefix(length):
            return j < max(i + 1, length)
        case Chunks(size):
            return i // size == j // size
        case _:
            return True


def seen_one_by_one(mask: Mask, problem: Attention) -> list[list[list[bool]]]:
    """Ask every pair of query and key on its own."""

    def sees(b: int, i: int, j: int) -> bool:
        if mask.terms and isinstance(mask.terms[0], Spans):
            first, last = (x.expand(problem.b, -1)[b, i] for x in (mask.terms[0].first, mask.terms[0].last))
            return bool(first <= j < last)
        where = place(mask, b, i, problem)
        if where is None or not where[0] <= j < where[1]:
            return False
        return all(shows(term, where[2] - where[0], j - where[0]) for term in mask.terms)

    keys = range(problem.k_offset, problem.k_offset + problem.n)
    return [[[sees(b, i, j) for j in keys] for i in range(problem.m)] for b in range(problem.b)]


SMALL = {"m": st.integers(0, 12), "n": st.integers(0, 14)}


@st.composite
def small(draw: st.DrawFn) -> Attention:
    """Draw a problem small enough to ask about every pair."""
    return draw(attentions(m=draw(st.integers(0, 12)), n=draw(st.integers(0, 14))))


def lower(problem: Attention) -> Any:
    """Lower a problem's mask."""
    offset = torch.tensor(problem.q_offset) if isinstance(problem.q_offset, tuple) else problem.q_offset
    sizes = problem.b, problem.m, problem.n
    return bounds(problem.build_mask(), *sizes, q_offset=offset, k_offset=problem.k_offset)


@given(small())
def test_a_mask_is_the_inequalities_of_its_terms(problem: Attention) -> None:
    assert visible(lower(problem), problem.n).tolist() == seen_one_by_one(problem.build_mask(), problem)


@given(small())
def test_bounds_never_decrease_along_the_rows(problem: Attention) -> None:
    """What a kernel needs to find the queries of a key tile by search, empty rows included."""
    seen = lower(problem)
    for edge in (seen.first, seen.last):
        assert bool((edge.diff(dim=1) >= 0).all())
        assert bool(((edge >= 0) & (edge <= problem.n)).all())


@given(small())
def test_a_slice_of_the_keys_sees_what_it_saw(problem: Attention) -> None:
    """With `k_offset`, each part of the keys keeps its columns of the whole."""
    if problem.q_offset is None and "documents" not in problem.mask and "lengths" not in problem.mask:
        problem = Attention(**{**vars(problem), "q_offset": problem.k_offset + problem.n - problem.m})
    whole = visible(lower(problem), problem.n)
    cut = problem.seed % (problem.n + 1)
    left = Attention(**{**vars(problem), "n": cut})
    right = Attention(**{**vars(problem), "n": problem.n - cut, "k_offset": problem.k_offset + cut})
    parts = [visible(lower(part), part.n) for part in (left, right)]
    assert torch.equal(torch.cat(parts, -1), whole)


@given(small(), st.randoms(use_true_random=False))
def test_joining_has_no_order(problem: Attention, random: Any) -> None:
    terms = list(problem.build_mask().terms)
    random.shuffle(terms)
    shuffled = (
        visible(bounds(Mask(tuple(terms)), problem.b, problem.m, problem.n, k_offset=problem.k_offset), problem.n)
        if problem.q_offset is None
        else visible(lower(problem), problem.n)
    )
    assert torch.equal(shuffled, visible(lower(problem), problem.n))


def test_a_window_counts_the_querys_own_key() -> None:
    """``i - size < j <= i + ahead``: libraries differ by one here."""
    seen = visible(bounds(masks.window(3), 1, 5, 5), 5)[0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert visible(bounds(masks.window(1, ahead=1), 1, 3, 3), 3)[0].int().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_queries_are_the_last_of_the_keys() -> None:
    """Bottom-right: two queries against five keys stand at positions 3 and 4."""
    assert visible(bounds(masks.causal(), 1, 2, 5), 5)[0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    lengths = masks.causal() & masks.lengths([3, 5])
    assert visible(bounds(lengths, 2, 1, 5), 5).int().tolist() == [[[1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]]


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (lambda: masks.causal() & masks.prefix(3), "prefix must be joined without causal"),
        (lambda: masks.prefix(3) & masks.prefix(4), "prefix must be in a mask at most once"),
        (lambda: masks.documents([1]) & masks.documents([1]), "documents must be in a mask at most once"),
        (lambda: masks.documents([1]) & masks.lengths([1]), "documents carry their own key lengths"),
        (lambda: masks.window(4, keep_first=2) & masks.chunks(3), "keep_first must be the same in every window"),
        (lambda: masks.window(4, keep_first=2) & masks.window(9), "keep_first must be the same in every window"),
        (lambda: masks.spans(torch.tensor([0]), torch.tensor([1])) & masks.causal(), "spans must be the only term"),
    ],
    ids=["prefix causal", "prefixes", "documents", "lengths documents", "keep chunks", "keep windows", "spans"],
)
def test_joins_that_are_no_interval_are_refused(join: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join()
