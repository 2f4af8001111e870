"""Calls that were asked before, or are equal but for sizes; and what of a size the code of a kernel depends on."""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, Final, NamedTuple

from .choices import LARGEST
from .plan import ALIGNED, MANY, MEMORIES

LONGEST: Final = 2**30 - 1  # tokens: positions and their differences stay inside int32
NEAR: Final = 2**31 // LARGEST  # elements from row to row, within which a tile of any choice spans less than 2^31
FORMS: Final = 64  # launches of kin that are kept at once


class Sizes(NamedTuple):
    """What calls differ in that are kin."""

    m: int
    n: int
    values: int
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    q_offset: int | None
    k_offset: int


class Kin:
    """Launches of calls that are equal but for sizes.

    Attributes:
        sees: What of these calls is read from their mask, if that is a question of its own.
        forms: Launches, by all that code and tiles depend on of a call's sizes.
        last: The sizes that were asked last, and their launch: layers of a model ask the same, one after the other.
    """

    def __init__(self, sees: Any = None) -> None:
        """Have seen none."""
        self.sees = sees
        self.forms: dict[Hashable, Any] = {}
        self.last: tuple[Any, Any] = None, None

    def find(self, sizes: Hashable) -> Any:
        """Find how exactly these sizes were launched last, or None."""
        last, launch = self.last
        return launch if last == sizes else None

    def learn(self, sizes: Hashable, form: Hashable, launch: object) -> None:
        """Keep how a problem was launched."""
        if form not in self.forms and len(self.forms) >= FORMS:
            del self.forms[next(iter(self.forms))]  # the oldest
        self.forms[form] = launch
        self.last = sizes, launch


class Sightings:
    """Problems that were asked once: what comes a second time is worth remembering.

    A cache that grows asks a new problem at every step. Numbers are kept, not problems: a collector of garbage has
    nothing to follow, and two problems of one number are only remembered a little early.
    """

    def __init__(self) -> None:
        """Have seen nothing."""
        self.marks: set[int] = set()
        MEMORIES.append(self.marks)

    def again(self, key: Hashable) -> bool:
        """Whether a problem was seen before; from now on it was."""
        try:
            mark = hash(key)
        except TypeError:  # see `plan.recall`
            return False
        if mark in self.marks:
            return True
        if len(self.marks) >= MANY:
            self.marks.clear()
        self.marks.add(mark)
        return False


@lru_cache(maxsize=4096)
def kinds(*strides: tuple[int, ...]) -> tuple[int, ...]:
    """What triton specialises of strides, and descriptors ask of them: powers of two that divide them, 1, 0, width."""
    return tuple((64 if x == 1 else min(x & -x, ALIGNED)) + 128 * (x >= 2**31) for stride in strides for x in stride)
