"""Which tiles a kernel runs with: one function from what is known before a launch to a choice.

What was tuned on this GPU (`longspan.autotune`), and where nothing was, a documented heuristic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from longspan.autotune import Asked, Lookup, Values, checked, overridden

Kernel = Literal["forward", "backward_keys", "backward_queries"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a choice may depend on.

    Attributes:
        kernel: Which kernel: ``forward``, ``backward_keys`` (dk and dv) or ``backward_queries`` (dq).
        architecture: ``sm_90``, ``gfx942``, …, or ``interpreter``.
        width: The larger of head and value dimension, padded to a power of two.
        itemsize: Bytes of an element of q.
        masked: Whether some tiles are cut by the mask on most rows' way (causal, window, rows).
        descriptors: Whether the tensors' strides and alignment allow tensor descriptors.
        short: Whether there are so few keys that other tiles are faster; see `brief`.
    """

    kernel: Kernel
    architecture: str
    width: int
    itemsize: int
    masked: bool
    descriptors: bool
    short: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Launch parameters of a kernel; hashable, printable, JSON-able.

    Attributes:
        tile_m: Queries of a tile.
        tile_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        descriptors: Whether tiles are loaded through tensor descriptors (the bulk copy engine of sm_90 and up).
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


SHORT: Final = 2048  # keys
LARGEST: Final = 256  # queries or keys of a tile: see `kin.NEAR` and `decode_choices.LEAST`

# Kernel, width and whether tensors can be described: tile_m, tile_n, num_warps, num_stages, descriptors.
HOPPER: Final = {
    ("forward", 64, True): (128, 64, 4, 3, True),
    ("forward", 64, False): (128, 64, 4, 3, False),
    ("forward", 128, True): (128, 64, 8, 3, False),
    ("forward", 128, False): (128, 64, 8, 3, False),
    ("forward", 256, True): (128, 64, 8, 2, True),
    ("forward", 256, False): (128, 32, 8, 3, False),
    ("backward_keys", 64, True): (64, 64, 4, 3, True),
    ("backward_keys", 64, False): (64, 64, 4, 3, False),
    ("backward_keys", 128, True): (64, 64, 4, 2, True),
    ("backward_keys", 128, False): (32, 64, 4, 3, False),
    ("backward_keys", 256, True): (64, 64, 8, 2, True),
    ("backward_keys", 256, False): (64, 64, 8, 2, False),
    ("backward_queries", 64, True): (128, 64, 4, 3, True),
    ("backward_queries", 64, False): (64, 64, 4, 3, False),
    ("backward_queries", 128, True): (128, 64, 8, 3, True),
    ("backward_queries", 128, False): (128, 64, 8, 3, False),
    ("backward_queries", 256, True): (128, 32, 8, 2, True),
    ("backward_queries", 256, False): (128, 32, 8, 2, False),
}  # fmt: skip


def choose(key: Key) -> Choice:
    """Choose what was tuned on this GPU, or by the heuristic; an interpreter has no GPU that could be asked for."""
    return heuristic(key) if key.architecture == "interpreter" and not overridden() else TUNED(key)


def asked(key: Key) -> Asked:
    """Write a key as tables know it."""
    values = {name: value for name, value in vars(key).items() if name not in {"kernel", "architecture", "short"}}
    values |= {"short": True} if key.short else {}  # said where it is, so that no other row serves it
    return Asked(f"flash.{key.kernel}", key.architecture, values)


def build(key: Key, values: Values) -> Choice:
    """Make a choice of a row's; tensors that cannot be described are read through pointers."""
    made: Any = dict(bounded(checked(values, ("tile_m", "tile_n", "num_warps"), ("num_stages",)), "tile_m", "tile_n"))
    choice = Choice(**made)
    return choice if key.descriptors or not choice.descriptors else replace(choice, descriptors=False)


def bounded(values: Values, *names: str) -> Values:
    """Return launch parameters once tiles are seen to be no larger than whoever remembers launches counts on.

    Raises:
        ValueError: For a larger one.
    """
    for name in names:
        if int(values[name]) > LARGEST:
            msg = f"{name} must be at most {LARGEST}, got {values[name]}"
            raise ValueError(msg)
    return values


def brief(key: Key, keys: int) -> Key:
    """Mark a key where programs of so few keys are mostly start and end, which a second one hides.

    Raced on an H200 (triton 3.6.0, bf16, 16k tokens, width 128, causal): two programs a multiprocessor, each of 64
    queries, reach 245, 348 and 434 TFLOP/s at 512, 1024 and 2048 keys, one of 128 queries 197, 289 and 374.
    """
    lower = key.kernel == "forward" and key.architecture == "sm_90" and key.masked and key.descriptors
    return replace(key, short=True) if lower and short(keys) and key.width == 128 and key.itemsize == 2 else key


def short(keys: int) -> bool:
    """Whether there may be other tiles for so few keys: all that a choice depends on of their number."""
    return keys <= SHORT


def heuristic(key: Key) -> Choice:
    """Choose by architecture, then by how much of a tile fits the registers and the shared memory."""
    if key.architecture == "interpreter":
        return Choice(tile_m=32, tile_n=32, num_warps=1, num_stages=1, descriptors=key.descriptors)
    if key.itemsize == 4:
        return exact(key)
    if key.architecture.startswith("gfx"):
        return amd(key)
    if key.architecture in {"sm_90", "sm_100", "sm_103"}:
        return hopper(key)
    return ampere(key)


def exact(key: Key) -> Choice:
    """float32 without tensor cores: small tiles, which fit 99 KB of shared memory at every width."""
    if key.width > 128:
        small = 32 if key.kernel == "forward" else 16
        return Choice(tile_m=small, tile_n=small, num_warps=4, num_stages=1)
    return Choice(tile_m=32 if key.width > 64 else 64, tile_n=32, num_warps=4, num_stages=1)


def hopper(key: Key) -> Choice:
    """sm_90 and up: 228 KB of shared memory, and wgmma, which wants 64 rows for each group of four warps.

    Raced on an H200 (triton 3.6.0, bf16, 16k tokens, causal and full), all but the forward pointers of width 256:
    descriptors win where a tile is read by four warps, and lose to pointers where eight share it.
    """
    if key.short:
        return Choice(tile_m=64, tile_n=64, num_warps=4, num_stages=3, descriptors=True)
    width = 64 if key.width <= 64 else 128 if key.width == 128 else 256
    tile_m, tile_n, num_warps, num_stages, descriptors = HOPPER[key.kernel, width, key.descriptors]
    return Choice(tile_m=tile_m, tile_n=tile_n, num_warps=num_warps, num_stages=num_stages, descriptors=descriptors)


def ampere(key: Key) -> Choice:
    """sm_80 to sm_89 and sm_120: 99 to 163 KB of shared memory; sized for the smaller."""
    wide = key.width > 128
    if key.kernel == "forward":
        return Choice(tile_m=64 if wide else 128, tile_n=32 if wide else 64, num_warps=8 if wide else 4, num_stages=2)
    small = 32 if wide else 64
    return Choice(tile_m=small, tile_n=small, num_warps=4, num_stages=1 if wide else 2)


def amd(key: Key) -> Choice:
    """gfx942 and gfx950: wavefronts of 64 lanes and 64 KB of LDS."""
    wide = key.width > 128
    if key.kernel == "forward":
        return Choice(tile_m=128, tile_n=32 if wide else 64, num_warps=4, num_stages=1)
    small = 32 if wide else 64
    return Choice(tile_m=small, tile_n=small, num_warps=4, num_stages=1)


# What each kernel compiles: a choice that was tuned for other code does not serve.
SOURCES: Final[Mapping[str, tuple[str, ...]]] = {
    "flash.forward": ("longspan.backends.flash.forward:forward_kernel",),
    "flash.backward_keys": ("longspan.backends.flash.backward:backward_keys_kernel",),
    "flash.backward_queries": ("longspan.backends.flash.backward:backward_queries_kernel",),
}
TUNED: Final[Lookup[Key, Choice]] = Lookup(asked, build, heuristic, SOURCES)
