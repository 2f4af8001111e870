"""Problems that the laws quantify over: small frozen values whose repr can be pasted into a test.

A problem holds sizes, options and a seed, never elements: `inputs` draws those from the seed, in float64 on the
CPU, so that every dtype and device sees the same numbers.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from longspan.spec import Rotation, bounds, inv_freq, masks, visible
from longspan.spec.masks import Mask
from longspan.spec.pairing import Pairing

from .layout import lay, lay_like, to


class Inputs(NamedTuple):
    """Tensors of an attention problem."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    d_lse: Tensor
    options: dict[str, Any]
    """Keyword arguments of `attention`, the mask included."""
    trained: str
    """Initials of the arguments that need a gradient."""

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positional arguments of `attention`."""
        return self.q, self.k, self.v


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One call of attention: sizes as in `longspan.spec.attention`, options, and how its numbers are drawn.

    Attributes:
        mask: Source of a mask, in the names of `longspan.spec.masks`.
        sink: Magnitude of the sinks; None is no sink.
        alibi: Largest slope; None is none.
        storage: How q lies in memory; see `longspan.laws.layout.lay`.
        k_storage: How k lies in memory; None is as q.
        v_storage: How v lies in memory; None is as q.
        d_out_storage: How the cotangent of out lies in memory.
        trained: Initials of the arguments that need a gradient, s for the sink.
        index: Dtype of lengths, tables and slots.
        amplitude: Root mean square of the scores' inputs; scores grow with its square.
        mean: Mean of the values; weights must sum to one however large it is.
        needle: One key of each sequence carries a large value: what sees it wrongly is off by far.
        dead: What lies in the slots of keys that no query sees.
    """

    b: int = 1
    h: int = 1
    g: int = 1
    m: int
    n: int
    d: int = 16
    e: int = 16
    dtype: str = "float32"
    mask: str = "everything()"
    scale: float | None = None
    softcap: float | None = None
    sink: float | None = None
    alibi: float | None = None
    q_offset: int | tuple[int, ...] | None = None
    k_offset: int = 0
    out_dtype: str | None = None
    storage: str = "bhmd"
    k_storage: str | None = None
    v_storage: str | None = None
    d_out_storage: str = "bhmd"
    trained: str = "qkvs"
    index: str = "int64"
    amplitude: float = 1.0
    mean: float = 0.0
    needle: bool = False
    dead: float = 0.0
    seed: int = 0

    def __repr__(self) -> str:
        """Write what differs from the defaults, as source."""
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        shown = (
            f"{name}={source(value)}" for name, value, default in given if value is not default and value != default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def build_mask(self) -> Mask:
        """Build the mask from its source."""
        return eval(self.mask, {**vars(masks), "tensor": torch.tensor})  # noqa: S307 - our own source, never a user's

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """Draw the tensors from the seed."""
        dtype, draw = getattr(torch, self.dtype), torch.Generator().manual_seed(self.seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        stored = {"q": self.storage, "k": self.k_storage or self.storage, "v": self.v_storage or self.storage}
        rows = {name: 1 if storage == "expand" else self.b for name, storage in stored.items()}
        q = self.amplitude * normal(rows["q"], self.h, self.m, self.d)
        k = self.amplitude * normal(rows["k"], self.g, self.n, self.d)
        v = self.mean + normal(rows["v"], self.g, self.n, self.e)
        if self.needle and self.n:
            v[:, :, torch.randint(self.n, (), generator=draw)] += 1000.0
        q, k, v = (lay(x.to(dtype), stored[name], self.b) for name, x in zip("qkv", (q, k, v), strict=True))
        mask = self.build_mask()
        q_offset = torch.tensor(self.q_offset, dtype=torch.int32) if isinstance(self.q_offset, tuple) else self.q_offset
        seen = visible(bounds(mask, self.b, self.m, self.n, q_offset=q_offset, k_offset=self.k_offset), self.n)
        unseen = rearrange(~seen.any(1), "b n -> b 1 n 1")
        if self.dead != 0.0:
            k = k if rows["k"] != self.b else lay_like(k.masked_fill(unseen, self.dead), k)
            v = v if rows["v"] != self.b else lay_like(v.masked_fill(unseen, self.dead), v)
        sink = None if self.sink is None else (self.sink * normal(self.h)).to(wide).to(device)
        alibi = None if self.alibi is None else (self.alibi * 2.0 ** -torch.arange(self.h)).to(wide).to(device)
        options = {
            "mask": mask, "scale": self.scale, "softcap": self.softcap, "sink": sink, "alibi": alibi,
            "q_offset": q_offset.to(device) if isinstance(q_offset, Tensor) else q_offset, "k_offset": self.k_offset,
            "out_dtype": None if self.out_dtype is None else getattr(torch, self.out_dtype),
        }  # fmt: skip
        alike = 1 if self.d_out_storage == "expand" else self.b
        d_out = normal(alike, self.h, self.m, self.e).to(options["out_dtype"] or dtype)
        d_out = to(lay(d_out, self.d_out_storage, self.b), device)
        d_lse = normal(self.b, self.h, self.m).to(wide)
        return Inputs(to(q, device), to(k, device), to(v, device), d_out, d_lse.to(device), options, self.trained)


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """One call of rotate: sizes as in `longspan.spec.rotate`, and how its numbers are drawn.

    Attributes:
        planes: Planes that turn; 2 · planes < d is partial rotary.
        largest: Positions are drawn below it.
        position: Shape of the positions: ``m``, ``bm`` or ``abm`` (three axes).
        rows: Whether each sequence of the batch turns at its own speeds.
        factors: Whether each sequence has an attention factor of its own, besides.
        index: Dtype of the positions.
        storage: How queries and keys lie in memory; see `longspan.laws.layout.lay`.
    """

    b: int = 1
    h: int = 1
    g: int = 1
    m: int
    d: int = 16
    planes: int = 8
    dtype: str = "float32"
    pairing: Pairing = "half"
    position: str = "m"
    largest: int = 4096
    base: float = 10_000.0
    attention_factor: float = 1.0
    rows: bool = False
    factors: bool = False
    index: str = "int64"
    storage: str = "bhmd"
    seed: int = 0

    __repr__ = Attention.__repr__

    def inputs(self, device: torch.device | str = "cpu") -> "Turned":
        """Draw the tensors from the seed."""
        dtype, draw = getattr(torch, self.dtype), torch.Generator().manual_seed(self.seed)
        rows = 1 if self.storage == "expand" else self.b
        q, k = (
            lay(
                torch.randn(rows, heads, self.m, self.d, generator=draw, dtype=torch.float64).to(dtype),
                self.storage,
                self.b,
            )
            for heads in (self.h, self.g)
        )
        shape = {"m": (self.m,), "bm": (self.b, self.m), "abm": (3, self.b, self.m)}[self.position]
        position = torch.randint(self.largest, shape, generator=draw).to(getattr(torch, self.index))
        slower = 1 + torch.rand(self.b if self.rows else 1, 1, generator=draw, dtype=torch.float64)
        speed = inv_freq(2 * self.planes, base=self.base) / slower
        each = self.attention_factor / torch.arange(1, self.b + 1, dtype=torch.float64)
        rotation = Rotation(
            speed if self.rows else rearrange(speed, "1 p -> p"),
            attention_factor=each if self.rows and self.factors else self.attention_factor,
            axis=torch.randint(3, (self.planes,), generator=draw) if self.position == "abm" else None,
        )
        return Turned(to(q, device), to(k, device), position.to(device), rotation.to(device))


class Turned(NamedTuple):
    """Tensors of a rotation problem."""

    q: Tensor
    k: Tensor
    position: Tensor
    rotation: Rotation


def source(value: object) -> str:
    """Write a value as Python source that reads back."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):  # noqa: PLR0124
        return f'float("{value}")'
    return repr(value)
