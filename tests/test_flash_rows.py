"""Bounds of rows that a kernel lowers are the definition's."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from longspan import spec
from longspan.backends import flash
from longspan.backends.flash import lowering
from longspan.backends.flash.lowering import lower
from longspan.backends.flash.reach import FARTHEST
from longspan.spec import masks
from longspan.spec.affine import affine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
NEVER: dict[str, Any] = {"q_offset": None, "k_offset": 0}
ASKS: dict[str, Any] = {
    "b": st.sampled_from((1, 2, 3)), "m": st.integers(0, 300), "n": st.integers(0, 300),
    "k_offset": st.sampled_from((0, 0, 7)), "seed": st.integers(0, 9), "t": st.sampled_from((0, 1, 3, 40, 70)),
    "kind": st.sampled_from(("documents", "documents of each", "lengths", "offsets", "offset", "none")),
    "dtype": st.sampled_from((torch.int32, torch.int64)), "there": st.booleans(), "view": st.booleans(),
    "terms": st.lists(st.sampled_from(("causal", "window", "ahead", "chunks", "other chunks", "prefix")), max_size=4),
    "keep": st.sampled_from((0, 4, 70)), "size": st.integers(1, 90),
}  # fmt: skip
asks = st.fixed_dictionaries(ASKS)


def lengths(ask: dict[str, Any], *shape: int, most: int, seed: int = 0) -> Tensor:
    """Draw lengths, a third of them 0, on either device, perhaps a view."""
    make = torch.Generator().manual_seed(ask["seed"] + seed)
    values = (torch.rand(shape, generator=make) * most).to(ask["dtype"]) * (torch.rand(shape, generator=make) > 0.3)
    values = values.to(ask["dtype"]).to(DEVICE if ask["there"] else "cpu")
    return torch.stack([values, values + 1], -1)[..., 0] if ask["view"] else values


def masked(ask: dict[str, Any]) -> tuple[masks.Mask, dict[str, Any]]:
    """Make a mask, most have rows with bounds of their own, and a problem for it."""
    mask, b, t, size = masks.everything(), ask["b"], ask["t"], ask["size"]
    problem = NEVER | {name: ask[name] for name in ("b", "m", "n", "k_offset")}
    if ask["kind"].startswith("documents"):
        shape = (t,) if ask["kind"] == "documents" else (b, t)
        most = 150 if t < 9 else 9
        mask = masks.documents(lengths(ask, *shape, most=most), lengths(ask, *shape, most=20, seed=size % 2))
    elif ask["kind"] == "lengths":
        mask = masks.lengths(lengths(ask, b, most=400))
    elif ask["kind"] == "offsets":
        problem["q_offset"] = lengths(ask | {"there": True}, b, most=400) - 50
    elif ask["kind"] == "offset":
        problem["q_offset"] = 7 * size - 300
    made = {
        "causal": masks.causal(), "window": masks.window(size, keep_first=ask["keep"]),
        "ahead": masks.window(size // 2 + 1, ahead=size, keep_first=ask["keep"]),
        "chunks": masks.chunks(size), "other chunks": masks.chunks(3 * size // 2 + 1),
        "prefix": masks.prefix(3 * size - 3),
    }  # fmt: skip
    for term in ask["terms"]:
        with suppress(ValueError):  # of joins that are no mask
            mask &= made[term]
    return mask, problem


def defined(mask: masks.Mask, asked: dict[str, Any]) -> tuple[Tensor, int]:
    """Bounds of rows by the definition, and how many keys are kept."""
    seen = spec.bounds(mask, **asked, device=torch.device(DEVICE))
    rows = torch.stack([seen.first, seen.last, seen.base, seen.position])
    return rows.clamp(-FARTHEST, FARTHEST).to(torch.int32), seen.keep


PLAIN: dict[str, Any] = {
    "b": 2, "m": 220, "n": 230, "k_offset": 7, "seed": 0, "t": 3, "kind": "documents", "dtype": torch.int32,
    "there": False, "view": False, "terms": ["prefix"], "keep": 0, "size": 9,
}  # fmt: skip


@example(PLAIN)
@example(PLAIN | {"kind": "offset", "terms": ["chunks", "causal"], "size": 31})
@example(PLAIN | {"kind": "documents of each", "t": 40, "terms": ["window", "ahead"], "keep": 4})
@given(asks)
def test_rows_are_what_the_definition_says(ask: dict[str, Any]) -> None:
    mask, asked = masked(ask)
    seen = lower(mask, **asked, device=torch.device(DEVICE))
    if seen.rows is None:  # rows of one interval that moves, or none at all
        rest = {name: asked[name] for name in ("m", "n", "q_offset", "k_offset")}
        assert affine(mask, **rest) is not None
        return
    rows, keep = defined(mask, asked)
    assert torch.equal(seen.rows, rows)
    assert seen.keep == keep


def test_many_documents_over_many_blocks_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (300,), generator=draw)
    mask = masks.documents(counts.to(DEVICE), (counts * 2).to(DEVICE)) & masks.window(30, keep_first=2)
    asked: dict[str, Any] = {"b": 1, "m": 4000, "n": 14000, "k_offset": 0, "q_offset": None}
    rows, _ = defined(mask, asked)
    found = lower(mask, **asked, device=torch.device(DEVICE)).rows
    assert found is not None
    assert torch.equal(found, rows)


def test_what_a_kernel_lowers_is_lowered_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "bounds", None)
    asked: dict[str, Any] = {"b": 2, "m": 9, "n": 11, "k_offset": 0, "q_offset": None, "device": torch.device(DEVICE)}
    for mask in (
        masks.documents([4, 5]),
        masks.prefix(3),
        masks.chunks(2) & masks.chunks(3),
        masks.window(3, keep_first=1),
    ):
        assert lower(mask, **asked).rows is not None
    with pytest.raises(TypeError):
        lower(masks.chunks(2) & masks.chunks(3) & masks.chunks(5), **asked)
