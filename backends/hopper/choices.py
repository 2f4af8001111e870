"""What the forward kernel is compiled for: tiles, and the features that a call asks for.

Tiles are those that were tuned on this GPU (`longspan.autotune`), and where nothing was, a documented heuristic's.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from torch import Tensor

from longspan.autotune import Asked, Lookup, Values, checked

from ..flash.reach import all_seen, each_sees
from .gluon import VERSION, gl
from .launch import SOURCES, Call, padded


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Everything that the forward kernel knows when it is compiled, named as in the kernel.

    Attributes:
        W: Warpgroups that compute.
        M: Queries of each.
        N: Keys of a tile.
        D: Head dimension in shared memory.
        E: Value dimension in shared memory.
        STAGES: Tiles of keys, and of values, that shared memory holds.
        REGISTERS: Registers of a thread of a computing warpgroup.
        LOADER: Registers of a thread of the loading warp.
        HEADS: Heads whose tiles are computed side by side, sharing the L2 cache.
        MASK: ``none`` (every key is seen, and there are whole tiles of them), ``affine``, ``each`` (affine, with
            integers of each sequence) or ``rows``.
        ONCE: Whether the mask cuts no other tile than the last that a warpgroup reads: a causal mask of whole tiles.
        LEFT: Whether the mask may hide keys on the left of those that a row sees.
        KEEP: Whether a head of keys stays visible beside the interval.
        DEAD: Whether keys that nobody sees, which may hold NaN, can lie in a tile that is read.
        SOFTCAP: Whether scores are capped.
        BIASED: Whether scores are scaled, and lowered with the distance (ALiBi), before their maximum is known; else
            the scale is positive, and is part of the exponential.
        STAGED: Whether out leaves through shared memory; in float32 it leaves from registers.
        REUSE: Whether it leaves through that of the queries, where there is no room for more.
        HELD: Whether the queries of a tile stay in registers, which spares the tensor cores to read them once per tile
            of keys.
        OVERLAP: Whether the exponentials of a tile come before the wait for the values of the tile before it.
    """

    W: int
    M: int
    N: int
    D: int
    E: int
    STAGES: int
    REGISTERS: int
    LOADER: int
    HEADS: int
    MASK: str
    ONCE: bool
    LEFT: bool
    KEEP: bool
    DEAD: bool
    SOFTCAP: bool
    BIASED: bool
    STAGED: bool
    REUSE: bool
    HELD: bool
    OVERLAP: bool

    @property
    def SCORES(self) -> Any:  # noqa: N802 - named as the constants of the kernel
        """Layout of scores [M, N] in registers: an accumulator."""
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.N, 16]))

    @property
    def OUT(self) -> Any:  # noqa: N802
        """Layout of sums of values [M, E]: an accumulator."""
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.E, 16]))

    @property
    def SUMS(self) -> Any:  # noqa: N802
        """Layout of sums of weights [M, 8]: of every eight columns of `SCORES`, the two that a thread holds."""
        return gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


def widths(d: int, e: int) -> tuple[int, int]:
    """Head and value dimension in shared memory: few pairs, since a kernel is compiled for each."""
    if padded(d) == 256 and padded(e) <= 128:
        return 256, 128
    return max(padded(d), padded(e)), max(padded(d), padded(e))


TALL: Final = 64  # queries of a warpgroup; every N is a multiple


def cut_once(m: int, low: int, high: int, stop: int, keys: int) -> bool:
    """Say whether an affine mask cuts no other tile than the last of those that a warpgroup reads."""
    return low <= 1 - m and high % TALL == 1 and (stop >= m - 1 + high or stop % keys == 0)


class Key(NamedTuple):
    """What tiles may depend on.

    Attributes:
        d: Head dimension in shared memory.
        e: Value dimension there.
        masked: Whether some query does not see some key.
        rich: Whether scores need registers beyond an affine mask that leaves no key unseen.
    """

    d: int
    e: int
    masked: bool
    rich: bool


class Tiles(NamedTuple):
    """How the work is cut up; see `Variant`."""

    W: int
    N: int
    STAGES: int
    REGISTERS: int
    LOADER: int
    HEADS: int


def tiles_by_rule(key: Key) -> Tiles:
    """Cut tiles by what fits the registers and the shared memory."""
    warpgroups = 3 if key.d == 64 else 2
    # Three warpgroups have 160 registers a thread: with more to do than a mask, half a tile's scores are what fits.
    keys = 64 if key.d == 256 or (key.d == 64 and key.rich) else 128
    stages = 2 if key.d > 64 else 4 * 128 // keys
    return Tiles(warpgroups, keys, stages, 160 if warpgroups == 3 else 240, 32 if warpgroups == 3 else 24, 8)


def asked(key: Key) -> Asked:
    """Write a key as tables know it."""
    return Asked("hopper.forward", "sm_90", key._asdict())


def build(_: Key, values: Values) -> Tiles:
    """Make tiles of a row's; see `cut_once` for the least N, and a ring of one tile would wait for itself."""
    made: Any = dict(checked(values, ("N",), ("W", "STAGES", "REGISTERS", "LOADER", "HEADS")))
    if made["N"] < TALL or made["STAGES"] == 1 or made["W"] not in {2, 3}:
        msg = f"tiles must have {TALL} keys and 2 stages at least, and 2 or 3 warpgroups, got {made}"
        raise ValueError(msg)
    return Tiles(**made)


TUNED: Final[Lookup[Key, Tiles]] = Lookup(asked, build, tiles_by_rule, SOURCES)


def variant(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Variant:
    """Choose how a call is computed."""
    m, n = q.shape[2], k.shape[2]
    d, e = widths(q.shape[3], v.shape[3])
    low, high, stop, _, keep = call.interval
    mask = "rows" if call.rows is not None else "each" if call.sequences is not None else "affine"
    dead = not all_seen(call.lowered, m, n)
    biased = call.alibi is not None or call.negative
    everything = mask == "affine" and each_sees(m, n, *call.interval)
    rich = dead or mask == "rows" or biased or call.softcap is not None
    tiles = TUNED(Key(d, e, masked=not everything, rich=rich))
    # The widest are staged where the queries were, whose dtype that place has.
    staged = call.out_dtype.itemsize == 2 and (e < 256 or call.out_dtype == q.dtype)
    # With more to do than a mask the queries do not fit, and Triton 3.9 needs more registers for the same code.
    held = d == e == 128 and tiles.W == 2 and not rich and VERSION < (3, 9)
    whole = everything and n % tiles.N == 0
    return Variant(
        **tiles._asdict(), M=TALL, D=d, E=e,
        MASK="none" if whole else mask,
        ONCE=mask == "affine" and cut_once(m, low, high, stop, tiles.N),
        LEFT=mask != "affine" or low > 1 - m, KEEP=keep > 0,
        DEAD=dead,
        SOFTCAP=call.softcap is not None, BIASED=biased,
        STAGED=staged, REUSE=staged and e == 256, HELD=held,
        OVERLAP=tiles.W == 3 and whole,
    )  # fmt: skip
