"""What launches that are taken to other sizes count on: tiles of bounded size, and a bounded number of launches."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from longspan.backends.flash import choices, decode_choices, kin

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
