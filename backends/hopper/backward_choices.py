"""How the backward kernels are launched: as was tuned on this GPU (`longspan.autotune`), or by `backward.choose`."""

from typing import Any, Final, NamedTuple

from torch import Tensor

from longspan.autotune import Asked, Lookup, Values, checked

from ..flash.reach import each_sees
from .backward import Choice, choose, widths
from .launch import SOURCES, Call


class Key(NamedTuple):
    """What a choice may depend on.

    Attributes:
        d: Columns of a tile of queries or keys.
        e: Columns of a tile of values.
        plain: Whether nothing but an affine mask and ALiBi needs registers.
        even: Whether every key is seen by every query.
    """

    d: int
    e: int
    plain: bool
    even: bool


def chosen(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Choice:
    """Choose how the gradient of a call is computed."""
    m, n = q.shape[2], k.shape[2]
    even = call.rows is None and call.sequences is None and each_sees(m, n, *call.interval)
    plain = call.rows is None and call.softcap is None
    return TUNED(Key(*widths(q.shape[3], v.shape[3]), plain=plain, even=even))


def by_rule(key: Key) -> Choice:
    """Choose untuned."""
    return choose(key.d, key.e, plain=key.plain, even=key.even)


def asked(key: Key) -> Asked:
    """Write a key as tables know it."""
    return Asked("hopper.backward", "sm_90", key._asdict())


def build(_: Key, values: Values) -> Choice:
    """Make a choice of a row's; a ring of one tile would wait for itself."""
    made: Any = dict(checked(values, ("tile_m", "tile_n"), ("stages", "together")))
    if made["stages"] == 1:
        msg = f"the ring of queries must have 2 stages at least, got {made}"
        raise ValueError(msg)
    return Choice(**made)


TUNED: Final[Lookup[Key, Choice]] = Lookup(asked, build, by_rule, SOURCES)
