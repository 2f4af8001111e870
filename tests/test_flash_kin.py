"""What launches that are taken to other sizes count on: tiles of bounded size, and a bounded number of launches."""

import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from longspan.autotune import Case
from longspan.backends.flash import choices, decode_choices, decode_families, kin

FORWARD = choices.Key(kernel="forward", architecture="sm_90", width=64, itemsize=2, masked=True, descriptors=True)
FEW = decode_choices.TileKey(paged=False, architecture="sm_90", rows=16, width=64, itemsize=2, descriptors=True)
BUILDS = {
    "forward": (choices.build, FORWARD, {"tile_m": 64, "tile_n": 64, "num_warps": 4, "num_stages": 2}),
    "few": (decode_choices.build, FEW, {"tile_n": 64, "num_warps": 4, "num_stages": 2, "resident": 1}),
    "paged": (
        decode_choices.build, replace(FEW, paged=True), {"tile_n": 64, "num_warps": 4, "num_stages": 2, "resident": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("of", "name"), [("forward", "tile_m"), *((of, "tile_n") for of in BUILDS)])
def test_a_larger_tile_than_is_counted_on_is_no_choice(of: str, name: str) -> None:
    build, key, values = BUILDS[of]
    made: Any = build(key, values | {name: choices.LARGEST})
    assert getattr(made, name) == choices.LARGEST
    with pytest.raises(ValueError, match=f"{name} must be at most 256, got 512"):
        build(key, values | {name: 2 * choices.LARGEST})


def test_what_is_counted_on_covers_the_largest_tile() -> None:
    assert choices.LARGEST * kin.NEAR <= 2**31
    assert choices.LARGEST <= decode_choices.LEAST <= decode_choices.LEAST_PAGED


def test_kin_keep_few_launches_and_forget_the_oldest() -> None:
    known = kin.Kin()
    for i in range(kin.FORMS):
        known.learn((i,), i, f"launch {i}")
    known.learn("again", 0, "another launch")
    assert len(known.forms) == kin.FORMS
    assert known.forms[0] == "another launch"
    for i in range(kin.FORMS, 5 * kin.FORMS):
        known.learn((i,), i, f"launch {i}")
        assert len(known.forms) == kin.FORMS
        assert known.find((i,)) == known.forms[i] == f"launch {i}"
    assert list(known.forms) == list(range(4 * kin.FORMS, 5 * kin.FORMS))


@pytest.mark.parametrize("scale", [None, 0.0, -0.2])
def test_a_paged_problem_is_tuned_with_the_scale_that_it_asks_for(
    scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(decode_families.pages, "launch", lambda *given: launched.append(given))
    problem: dict[str, Any] = {"b": 2, "h": 2, "g": 1, "m": 1, "n": 64, "d": 16, "page": 16, "causal": True}
    case = Case(key={}, problem=problem | ({} if scale is None else {"scale": scale}), variant={})
    decode_families.prepare_paged(case, "cpu", False)()  # not filled in
    assert launched[0][9] == (1 / math.sqrt(16) if scale is None else scale)
