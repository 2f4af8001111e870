"""The problems that are raced, with the work that each one is by rule, and the small problems that gate them.

A matrix product counts 2 operations a multiply-add, so that attention forward is ``4 · m · n · d · h · b`` of which a
causal mask leaves half, and backward, with five products instead of two, 2.5 times that (FlashAttention-2, Dao 2023,
arXiv:2307.08691, §4.1). Decode counts the bytes of keys and values, rotation those read and written.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final

from longspan.laws import Attention, Rotate

SECTIONS: Final = ("forward", "backward", "decode", "rotate", "host", "features", "quantised", "growth", "memory")
WIDTH: Final = 2048  # heads · head dimension of the tables
TOKENS: Final = 16_384  # batch · tokens of the tables
K: Final = 1024
ITEM: Final = 2  # bytes of a bf16 element
TYPICAL: Final[dict[str, Any]] = {"h": 32, "g": 8, "d": 128}  # heads of an 8-billion-parameter model
# Sixteen documents of mixed length in 64k tokens.
DOCUMENTS: Final = (24 * K, 12 * K, 8 * K, 6 * K, 4 * K, 2904, 2600, 1800, 1100, 700, 444, 300, 256, 96, 31, 9)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One problem of one table.

    Attributes:
        section: The table.
        mask: What queries see: ``full``, ``causal``, ``window``, or ``packed`` (causal within `DOCUMENTS`).
        window: Keys that a query sees under ``window``, its own included.
        softcap: Cap of the scores.
        sinks: Whether every head has a learned sink.
        rotary: Whether queries and keys are rotated, and nothing attends.
        backward: Whether the gradient is raced, and not the function.
        quick: Whether ``--quick`` keeps it.
    """

    section: str
    b: int = 1
    h: int
    g: int
    m: int
    n: int
    d: int
    mask: str = "full"
    window: int = 0
    softcap: float | None = None
    sinks: bool = False
    rotary: bool = False
    backward: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """Name in one line, unique among all cells."""
        seen = f"window {self.window}" if self.window else self.mask
        size = f"b{self.b} h{self.h}/{self.g} d{self.d} m{self.m} n{self.n}"
        direction = "backward" if self.backward else "forward"
        return f"{self.section}: {size} {direction} " + ("rotary" if self.rotary else seen) + self.extras

    @property
    def extras(self) -> str:
        """What scores are beside scaled products, in words that follow a list."""
        return (f", softcap {self.softcap:g}" if self.softcap else "") + (", sinks" if self.sinks else "")

    @property
    def features(self) -> tuple[Any, ...]:
        """What the code that runs depends on, sizes apart: cells that share it share a gate."""
        scores = self.mask, self.softcap, self.sinks
        return self.rotary, self.backward, self.decodes, self.quantised, self.d, self.h // self.g, *scores

    @property
    def decodes(self) -> bool:
        """Whether few queries read a long cache."""
        return self.section == "decode" or (self.section == "host" and self.m == 1)

    @property
    def quantised(self) -> bool:
        """Whether heads of eight bits race beside those of sixteen."""
        return self.section == "quantised"

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that count as work; of a causal square, half by rule."""
        if self.mask == "window":
            return self.m * self.window - self.window * (self.window - 1) / 2
        if self.mask == "packed":
            return sum(length**2 / 2 for length in DOCUMENTS)
        return self.m * self.n / (2 if self.mask == "causal" else 1)

    @property
    def flops(self) -> float:
        """Floating-point operations, by rule."""
        return 4 * self.pairs * self.d * self.h * self.b * (2.5 if self.backward else 1)

    @property
    def bytes(self) -> float:
        """Bytes that have to move: those of keys and values, or of heads read and written."""
        if self.rotary:
            return 2 * self.b * (self.h + self.g) * self.m * self.d * ITEM
        return 2 * self.b * self.g * self.n * self.d * ITEM

    @property
    def unit(self) -> str:
        """Unit of the figure."""
        if self.section == "host":
            return "µs"
        return "TB/s" if self.rotary or self.decodes else "TFLOP/s"

    def figure(self, seconds: float) -> float:
        """Work by time, in 10^12 a second; of the host, the time itself, in microseconds."""
        if self.unit == "µs":
            return seconds * 1e6
        return (self.bytes if self.unit == "TB/s" else self.flops) / seconds * 1e-12

    def build_mask(self) -> str:
        """Source of the mask, in the names of `longspan.spec.masks`."""
        packed = f"documents({list(DOCUMENTS)}, {list(DOCUMENTS)}) & causal()"
        window = f"causal() & window({self.window})"
        return {"full": "everything()", "causal": "causal()", "window": window, "packed": packed}[self.mask]

    def as_json(self) -> dict[str, Any]:
        """The fields that say what was raced."""
        return {name: value for name, value in asdict(self).items() if name != "quick"}


def cells() -> list[Cell]:
    """Every cell, table by table."""
    return [*forward(), *backward(), *decode(), *rotation(), *host(), *features(), *quantised(), *growth(), *memory()]


def forward() -> list[Cell]:
    """FlashAttention's tables, one long prompt, and a window over it."""
    return [
        *square("forward", (K, 4 * K, 16 * K), {(64, "causal"), (128, "causal"), (128, "full"), (256, "causal")}),
        Cell(section="forward", **TYPICAL, m=128 * K, n=128 * K, mask="causal", quick=True),
        Cell(section="forward", **TYPICAL, m=128 * K, n=128 * K, mask="window", window=4096, quick=True),
    ]


def backward() -> list[Cell]:
    """The same tables, differentiated."""
    return square("backward", (4 * K, 16 * K), {(64, "causal"), (128, "causal"), (128, "full")})


def square(section: str, lengths: tuple[int, ...], quick: set[tuple[int, str]]) -> list[Cell]:
    """Tables of equal work: batch · tokens and heads · head dimension are fixed."""
    return [
        Cell(
            section=section,
            b=TOKENS // length,
            h=WIDTH // d,
            g=WIDTH // d,
            m=length,
            n=length,
            d=d,
            mask=mask,
            backward=section == "backward",
            quick=length == TOKENS and (d, mask) in quick,
        )
        for d in (64, 128, 256)
        for mask in ("causal", "full")
        for length in lengths
    ]


def features() -> list[Cell]:
    """What masks and scores of real models cost beside plain causal attention, of equal visible work."""
    size: dict[str, Any] = {"section": "features", **TYPICAL, "m": 64 * K, "n": 64 * K, "mask": "causal"}
    return [
        Cell(**size, quick=True),
        Cell(**{**size, "mask": "window"}, window=4096),
        Cell(**{**size, "mask": "packed"}, quick=True),
        Cell(**size, softcap=30.0),
        Cell(**size, sinks=True),
    ]


def quantised() -> list[Cell]:
    """The longest of the forward tables' problems, for heads in e4m3 beside those in bf16."""
    return square("quantised", (16 * K,), {(128, "causal"), (256, "causal")})


def host() -> list[Cell]:
    """Problems so small that a call is what the host does for it."""
    small: dict[str, Any] = {"section": "host", "h": 2, "g": 2, "m": 16, "d": 64, "quick": True}
    return [
        Cell(**small, n=16, mask="causal"),
        Cell(**{**small, "m": 1}, n=64),
        Cell(**small, n=16, rotary=True),
    ]


def decode() -> list[Cell]:
    """One query per sequence against a cache."""
    sizes = ((1, 8 * K), (1, 128 * K), (1, 1024 * K), (16, 32 * K), (64, 8 * K))
    return [Cell(section="decode", b=b, **TYPICAL, m=1, n=n, quick=True) for b, n in sizes]


def rotation() -> list[Cell]:
    """Queries and keys of one prompt."""
    return [
        Cell(section="rotate", **TYPICAL, m=m, n=m, rotary=True, backward=back, quick=not back or m == 128 * K)
        for back, lengths in ((False, (4 * K, 32 * K, 128 * K)), (True, (32 * K, 128 * K)))
        for m in lengths
    ]


def growth() -> list[Cell]:
    """One problem at growing length: time over n² is to be flat."""
    return [
        Cell(section="growth", h=8, g=2, d=128, m=n * K, n=n * K, mask="causal", quick=n <= 256)
        for n in (16, 64, 256, 1024)
    ]


def memory() -> list[Cell]:
    """Forward and backward at growing length: what is allocated beyond inputs and results is to be O(n)."""
    return [
        Cell(section="memory", h=2, g=2, d=128, m=n * K, n=n * K, mask="causal", backward=True, quick=n <= 256)
        for n in (4, 16, 64, 256, 1024)
    ]


def problems(cell: Cell) -> tuple[Attention | Rotate, ...]:
    """Small ragged problems of the cell's features: a plain one, and one with NaN in every key that nobody sees.

    Sizes of the plain one are multiples of 16, as the cell's are, and of no tile: Triton compiles the same code for
    both. Those of the other are odd. Peers do not promise to bear NaN, so that is for backends of this project.
    """
    if cell.rotary:
        ragged: dict[str, Any] = {
            "b": cell.b,
            "h": cell.h,
            "g": cell.g,
            "d": cell.d,
            "planes": cell.d // 2,
            "dtype": "bfloat16",
        }
        return (Rotate(**ragged, m=336, largest=2**17, seed=1),)
    heads: dict[str, Any] = {
        "softcap": cell.softcap,
        "sink": 2.0 if cell.sinks else None,
        "h": 2 * cell.h // cell.g,
        "g": 2,
        "d": cell.d,
        "e": cell.d,
        "dtype": "bfloat16",
        "seed": 1,
    }
    if cell.decodes:
        return (
            Attention(b=3, **heads, m=1, n=1232),
            Attention(b=3, **heads, m=1, n=1237, mask="lengths([1237, 1000, 1])", dead=float("nan"), needle=True),
        )
    if cell.quantised:
        mask = cell.build_mask()
        return (
            Attention(b=2, **heads, m=336, n=336, mask=mask),
            Attention(b=2, **heads, m=197, n=333, mask=f"{mask} & window(100)", dead=float("nan"), needle=True),
        )
    if cell.mask == "packed":
        packed = "documents([150, 0, 47], [200, 33, 90]) & causal()"
        return (
            Attention(b=2, **heads, m=336, n=336, mask="documents([200, 136], [200, 136]) & causal()"),
            Attention(b=2, **heads, m=197, n=333, mask=packed, dead=float("nan"), needle=True),
        )
    mask = "causal() & window(100)" if cell.mask == "window" else cell.build_mask()
    lengths = f"{mask} & lengths([304, 211])"
    return (
        Attention(b=2, **heads, m=336, n=336, mask=mask),
        Attention(b=2, **heads, m=197, n=333, mask=lengths, dead=float("nan"), needle=True),
    )
