"""How a rotation is cut up: what was tuned on this GPU (`longspan.autotune`), or else by a documented heuristic."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from longspan.autotune import Asked, Lookup, Values, checked

from .launch import INTERPRETED, architecture

FILLED: Final = 1024  # programs that keep a large GPU busy


class RopeChoice(NamedTuple):
    """Launch parameters of the rotation.

    Attributes:
        tokens: Tokens of a program.
        heads: Heads of a tile; a program walks over all of them, tile by tile.
        split: Programs that share a token's heads out.
        num_warps: Warps of a program.
    """

    tokens: int
    heads: int
    split: int
    num_warps: int


class RopeKey(NamedTuple):
    """What a choice may depend on: sizes are rounded, tokens down, the rest up, to powers of two.

    Attributes:
        architecture: ``sm_90``, ``gfx942``, …
        tokens: Exponent of the number of tokens of all sequences.
        heads: Most heads of a tensor.
        planes: Planes that turn.
        itemsize: Bytes of an element.
        inside: Whether the heads of a token lie together.
    """

    architecture: str
    tokens: int
    heads: int
    planes: int
    itemsize: int
    inside: bool


def choose_rope(tokens: int, heads: int, planes: int, itemsize: int, *, heads_inside: bool) -> RopeChoice:
    """Choose what was tuned on this GPU, or by the rule."""
    if INTERPRETED:
        return RopeChoice(16, 2, 1, 1)  # a tile costs the same whatever its size
    key = RopeKey(
        architecture=architecture(), tokens=tokens.bit_length() - 1, heads=power_of_two(heads),
        planes=power_of_two(planes), itemsize=itemsize, inside=heads_inside,
    )  # fmt: skip
    return TUNED(key) or rope_by_rule(tokens, heads, planes, itemsize, heads_inside=heads_inside)


def rope_by_rule(tokens: int, heads: int, planes: int, itemsize: int, *, heads_inside: bool) -> RopeChoice:
    """Pick launch parameters: what was fastest on an H200 at head dimension 128. They move bytes; little else counts.

    A lane has two 16-byte loads of each half of a head on their way: one starves the memory pipe, four the registers.
    A tile runs along memory: over heads where they lie inside a token, else over tokens. Where tokens are too few to
    fill a GPU, programs share their heads out, and each makes the same cosines again.
    """
    warps = 2 if heads_inside else 1
    rows = max(1, warps * 1024 // itemsize // power_of_two(planes))
    block_h = min(rows, power_of_two(heads), 8 if heads_inside else 2)
    block_m = rows // block_h
    split = 1 if heads_inside else 2
    split = min(-(-heads // block_h), max(split, -(-FILLED * block_m // tokens)))
    return RopeChoice(block_m, block_h, split, warps)


def power_of_two(n: int) -> int:
    """Least power of two from n on; Triton's own costs a host ten times as much."""
    return 1 << max(n - 1, 0).bit_length()


def asked(key: RopeKey) -> Asked:
    """Write a key as tables know it."""
    return Asked(
        "flash.rotate", key.architecture, {name: x for name, x in key._asdict().items() if name != "architecture"}
    )


def build(key: RopeKey, values: Values) -> RopeChoice:
    """Make a choice of a row's; more programs than tiles of heads would only make cosines."""
    made: Any = dict(checked(values, ("tokens", "heads", "num_warps"), ("split",)))
    choice = RopeChoice(**made)
    return choice._replace(split=min(choice.split, -(-key.heads // choice.heads)))


SOURCES: Final[Mapping[str, tuple[str, ...]]] = {"flash.rotate": ("longspan.backends.flash.rope_kernel:rotate_kernel",)}
# Where nothing was tuned the rule is asked, which knows the numbers that the key has rounded.
TUNED: Final[Lookup[RopeKey, RopeChoice | None]] = Lookup(
    asked,
    build,
    lambda _: None,
    SOURCES,
    nearby={"tokens": 1.0},
)
