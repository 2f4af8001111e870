"""The affine form of a mask shows every row exactly the keys that the bounds show it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.laws.problems import Attention
from longspan.laws.strategies import mask_sources
from longspan.spec import bounds, masks, visible
from longspan.spec.affine import Affine, affine


def shown(form: Affine, b: int, m: int, n: int) -> torch.Tensor:
    """Write an affine form out as a matrix [b, m, n]."""
    low, high, stop = (torch.as_tensor(x).expand(b)[:, None, None] for x in form[:3])
    i, j = torch.arange(m)[None, :, None], torch.arange(n)[None, None, :]
    return ((i + low).clamp(min=0) <= j) & (j < torch.minimum(i + high, stop))


@given(st.data(), st.integers(1, 3), st.integers(0, 20), st.integers(0, 20), st.sampled_from([0, 0, 1, 5, 30]))
def test_the_affine_form_shows_what_the_bounds_show(data: st.DataObject, b: int, m: int, n: int, k_offset: int) -> None:
    source = data.draw(mask_sources(b, m, n), label="mask")
    places = st.one_of(st.none(), st.integers(-30, 60), st.lists(st.integers(-30, 60), min_size=b, max_size=b))
    place = None if "documents" in source else data.draw(places, label="q_offset")
    place = torch.tensor(place) if isinstance(place, list) else place
    mask = Attention(b=b, m=m, n=n, mask=source).build_mask()
    form = affine(mask, m, n, q_offset=place, k_offset=k_offset)
    seen = bounds(mask, b, m, n, q_offset=place, k_offset=k_offset)
    if form is None:
        assert any(word in source for word in ("documents", "spans", "prefix", "chunks", "keep_first"))
        return
    assert torch.equal(shown(form, b, m, n), visible(seen, n))
    position = torch.as_tensor(form.position).expand(b)[:, None] + torch.arange(m)
    assert torch.equal(position, seen.position)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_the_affine_form_stays_within_the_tokens(m: int, n: int, size: int, place: int) -> None:
    form = affine(masks.causal() & masks.window(size), m, n, q_offset=place)
    assert form is not None
    assert all(-m <= int(x) <= n for x in form[:3])
