"""How a merge is cut up: what was tuned on this GPU (`longspan.autotune`), or else by a documented heuristic."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from longspan.autotune import Asked, Lookup, Values, checked

from .launch import INTERPRETED, architecture
from .rope_choices import power_of_two


class MergeChoice(NamedTuple):
    """Launch parameters of a merge.

    Attributes:
        rows: Rows of a program.
        num_warps: Warps of a program.
    """

    rows: int
    num_warps: int


class MergeKey(NamedTuple):
    """What a choice may depend on: numbers are rounded up to powers of two.

    Attributes:
        architecture: ``sm_90``, ``gfx942``, …
        parts: States that are merged.
        columns: Value dimension.
        itemsize: Bytes of an element of the parts.
    """

    architecture: str
    parts: int
    columns: int
    itemsize: int


def choose_merge(parts: int, e: int, itemsize: int) -> MergeChoice:
    """Choose what was tuned on this GPU, or by the rule."""
    if INTERPRETED:
        return MergeChoice(256, 4)  # a tile costs the same whatever its size
    return TUNED(MergeKey(architecture(), power_of_two(parts), power_of_two(e), itemsize))


def merge_by_rule(key: MergeKey) -> MergeChoice:
    """Give a lane sixteen numbers of each part."""
    return MergeChoice(max(1, min(16, 2048 // key.columns)), 4)


def asked(key: MergeKey) -> Asked:
    """Write a key as tables know it."""
    return Asked(
        "flash.merge", key.architecture, {"parts": key.parts, "columns": key.columns, "itemsize": key.itemsize}
    )


def build(_: MergeKey, values: Values) -> MergeChoice:
    """Make a choice of a row's."""
    made: Any = dict(checked(values, ("rows", "num_warps")))
    return MergeChoice(**made)


SOURCES: Final[Mapping[str, tuple[str, ...]]] = {"flash.merge": ("longspan.backends.flash.merge:merge_kernel",)}
TUNED: Final[Lookup[MergeKey, MergeChoice]] = Lookup(asked, build, merge_by_rule, SOURCES)
