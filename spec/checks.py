"""What makes a problem meaningless: every ValueError of the specification, in one place.

Backends call these same checks, so that one bad call has one message everywhere. No check reads the
values of a tensor: on a GPU that would stall the caller.
"""

import math
from numbers import Integral, Real
from typing import Final

import torch
from torch import Tensor

FLOATS: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS: Final = (torch.int32, torch.int64)
PAIRINGS: Final = ("half", "interleaved")
NUMBERS: Final = (Real, torch.SymFloat, torch.SymInt)  # numpy's scalars are Real; what a compiler traces is not


def floating(x: Tensor) -> torch.dtype:
    """Dtype in which the specification computes: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def refuse(what: str, allowed: str, got: object) -> None:
    """Raise the one kind of message this project has: what was wrong, what is allowed, what it got."""
    msg = f"{what} must be {allowed}, got {got}"
    raise ValueError(msg)


def check_tensors(**tensors: object) -> None:
    """Refuse what is no tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            refuse(name, "a tensor", type(x).__name__)


def check_count(what: str, value: object, least: int) -> None:
    """Refuse what is no whole number from ``least`` to below 2^31."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2**31:
        refuse(what, f"a whole number of at least {least} and below 2^31", repr(value))


def same_device(**tensors: object) -> None:
    """Refuse tensors that live on different devices, naming two of them."""
    placed = [(name, x.device) for name, x in tensors.items() if isinstance(x, Tensor)]
    for name, device in placed[1:]:
        if device != placed[0][1]:
            refuse(f"{placed[0][0]} and {name}", "on one device", f"{placed[0][1]} and {device}")


def check_planes(method: str, d: int, **positive: float) -> None:
    """Refuse an odd or empty rotary dimension and parameters that are not finite and above zero."""
    if d < 2 or d % 2:
        refuse(f"{method}: d, the number of rotated coordinates,", "even and at least 2", d)
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            refuse(f"{method}: {name}", "a finite number above 0", value)


def check_rotate(
    x: Tensor, position: Tensor, inv_freq: Tensor, factor: float | Tensor, axis: Tensor | None, pairing: str
) -> None:
    """Refuse a rotation that does not fit the heads or the tokens it is given."""
    check_tensors(x=x, position=position, inv_freq=inv_freq)
    same_device(x=x, position=position, inv_freq=inv_freq, attention_factor=factor, axis=axis)
    if pairing not in PAIRINGS:
        refuse("pairing", " or ".join(PAIRINGS), repr(pairing))
    if x.ndim != 4 or x.dtype not in FLOATS:
        refuse("x", "a floating tensor [b, h, m, d]", f"{x.dtype} {list(x.shape)}")
    if position.dtype not in INTEGERS:
        refuse("position", "int32 or int64", position.dtype)
    b, _, m, d = x.shape
    if 2 * inv_freq.shape[-1] > d:
        refuse("the planes of a rotation", f"at most d / 2 = {d // 2} for d = {d}", inv_freq.shape[-1])
    shapes = ([m], [1, m], [b, m]) if position.ndim < 3 else ([position.shape[0], 1, m], [position.shape[0], b, m])
    if list(position.shape) not in shapes:
        refuse("position", f"[{m}], [{b}, {m}] or [axes, {b}, {m}] for x {list(x.shape)}", list(position.shape))
    if inv_freq.ndim < 1 or inv_freq.dtype != torch.float64 or list(inv_freq.shape[:-1]) not in ([], [1], [b]):
        got = f"{inv_freq.dtype} {list(inv_freq.shape)}"
        refuse("inv_freq", f"float64 [planes], [1, planes] or [{b}, planes] for a batch of {b}", got)
    if isinstance(factor, Tensor) and list(factor.shape) not in ([], [1], [b]):
        refuse("attention_factor", f"a number, or numbers [1] or [{b}]", list(factor.shape))
    if axis is not None and (axis.dtype != torch.int64 or list(axis.shape) != [inv_freq.shape[-1]]):
        refuse("axis", f"int64, one number per plane, [{inv_freq.shape[-1]}]", f"{axis.dtype} {list(axis.shape)}")
    if position.ndim == 3 and position.shape[0] == 0:
        refuse("position", "given for at least one axis", list(position.shape))


def check_rerotate(old: Tensor, new: Tensor, factor: float | Tensor) -> None:
    """Refuse rotations between which no key can be moved."""
    if old.shape[-1] != new.shape[-1]:
        refuse("rotations of rerotate", "of equally many planes", [old.shape[-1], new.shape[-1]])
    if not isinstance(factor, Tensor) and factor == 0:
        refuse("attention_factor of the old rotation", "other than 0", factor)


def check_attention(  # noqa: C901
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    softcap: float | None,
    sink: Tensor | None,
    alibi: Tensor | None,
    q_offset: int | Tensor | None,
    k_offset: int,
    out_dtype: torch.dtype | None,
) -> None:
    """Refuse an attention problem whose parts do not fit each other."""
    given = {"sink": sink, "alibi": alibi}
    check_tensors(q=q, k=k, v=v, **{name: x for name, x in given.items() if x is not None})
    same_device(q=q, k=k, v=v, sink=sink, alibi=alibi, q_offset=q_offset)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype not in FLOATS:
            refuse(name, "a floating tensor [batch, heads, tokens, head_dim]", f"{x.dtype} {list(x.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        refuse("q, k and v", "of one dtype", f"{q.dtype}, {k.dtype} and {v.dtype}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        refuse("the batch of q, k and v", "equal", f"{q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[1:3] != v.shape[1:3]:
        refuse("heads and tokens of k and v", "equal", f"{list(k.shape[1:3])} and {list(v.shape[1:3])}")
    if q.shape[3] != k.shape[3]:
        refuse("head_dim of q and k", "equal", f"{q.shape[3]} and {k.shape[3]}")
    if q.shape[3] == 0 or v.shape[3] == 0 or k.shape[1] == 0 or q.shape[1] % max(k.shape[1], 1):
        refuse(
            "q heads",
            "a multiple of k heads, and no head empty",
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}",
        )
    for name, x in given.items():
        if x is not None and (list(x.shape) != [q.shape[1]] or x.dtype not in FLOATS):
            refuse(name, f"one floating number per head, [{q.shape[1]}]", f"{x.dtype} {list(x.shape)}")
    if scale is not None and not (isinstance(scale, NUMBERS) and math.isfinite(scale)):
        refuse("scale", "a finite number, and no tensor or array", repr(scale))
    if softcap is not None and not (isinstance(softcap, NUMBERS) and 0 < softcap <= torch.finfo(floating(q)).max):
        refuse("softcap", "a finite number above 0, or None, and no tensor or array", repr(softcap))
    if isinstance(q_offset, Tensor):
        if list(q_offset.shape) != [q.shape[0]] or q_offset.dtype not in INTEGERS:
            got = f"{q_offset.dtype} {list(q_offset.shape)}"
            refuse("q_offset", f"an int or an integer tensor [{q.shape[0]}]", got)
    elif q_offset is not None:
        check_count("q_offset", q_offset, -(2**31))
    check_count("k_offset", k_offset, 0)
    if out_dtype is not None and out_dtype not in FLOATS:
        refuse("out_dtype", f"one of {', '.join(map(str, FLOATS))}", out_dtype)


def check_lengths(**lengths: Tensor) -> None:
    """Refuse lengths that are not one integer per sequence, equally many everywhere."""
    check_tensors(**lengths)
    shapes = {name: list(x.shape) for name, x in lengths.items()}
    if (
        any(x.ndim != 1 or x.dtype not in INTEGERS for x in lengths.values())
        or len({x.numel() for x in lengths.values()}) > 1
    ):
        refuse(" and ".join(lengths), "int32 or int64, one number per sequence", shapes)


def check_ragged(**ragged: Tensor) -> None:
    """Refuse heads that are not laid out as tokens of all sequences, one after the other."""
    check_tensors(**ragged)
    for name, x in ragged.items():
        if x.ndim != 3:
            refuse(name, "[tokens, heads, head_dim]", list(x.shape))


def check_pages(k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Refuse a pool or a block table of the wrong shape."""
    check_tensors(k_pages=k_pages, v_pages=v_pages, table=table)
    same_device(k_pages=k_pages, v_pages=v_pages, table=table, lengths=lengths)
    if k_pages.ndim != 4 or v_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3] or k_pages.shape[2] == 0:
        refuse(
            "k_pages and v_pages",
            "[pages, heads, page, dim] with equal pages",
            f"{list(k_pages.shape)} and {list(v_pages.shape)}",
        )
    if table.ndim != 2 or table.shape[0] != lengths.shape[0] or table.dtype not in INTEGERS:
        refuse(
            "table",
            f"integers [{lengths.shape[0]}, pages of the longest sequence]",
            f"{table.dtype} {list(table.shape)}",
        )


def check_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    position: Tensor | None,
    rotated: bool,  # noqa: FBT001
) -> None:
    """Refuse new tokens that do not fit the cache they are written to."""
    check_tensors(k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot=slot)
    same_device(k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot=slot, position=position)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.ndim != 3 or cache.ndim != 4 or (x.shape[1], x.shape[2]) != (cache.shape[1], cache.shape[3]):
            refuse(
                f"{name} and {name}_cache",
                "[tokens, heads, dim] and [rows, heads, size, dim]",
                f"{list(x.shape)} and {list(cache.shape)}",
            )
        if x.dtype != cache.dtype:
            refuse(f"{name} and {name}_cache", "of one dtype", f"{x.dtype} and {cache.dtype}")
    if k.shape[0] != v.shape[0] or k_cache.shape[:3] != v_cache.shape[:3]:
        refuse(
            "keys and values",
            "equally many, in caches of equal rows and size",
            f"{list(k.shape)}, {list(v.shape)}, {list(k_cache.shape)}, {list(v_cache.shape)}",
        )
    if list(slot.shape) != [k.shape[0]] or slot.dtype not in INTEGERS:
        refuse("slot", f"one integer per token, [{k.shape[0]}]", f"{slot.dtype} {list(slot.shape)}")
    if rotated != (position is not None):
        refuse("position and rotation", "given together or not at all", "only one of them")
