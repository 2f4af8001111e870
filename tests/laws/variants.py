"""Problems of any size over few compiled kernels: what a thousand examples of every law are drawn from on a GPU.

Triton compiles a kernel anew for every dtype, head dimension class, mask form, option and divisibility of a stride by
16; problems drawn freely would need thousands, at seconds each. Here those are tied together in a few rows, and the
rest is free: sizes, values, offsets, seeds, and which of the masks and dimensions that compile alike.
`tests/test_conformance.py` counts what was compiled.
"""

from typing import Any, Final

from hypothesis import strategies as st

from .caches import PAGES
from .problems import Attention, Rotate
from .strategies import SEEDS, attentions, rotates, splits
from .table import LAWS, MILD, UNPLACED, Law

MOST: Final = 60  # variants of one kernel

# At most 3 queries, or more than count as few: rows of few queries then fill a tile of one size.
QUERIES = st.one_of(st.sampled_from([0, 1, 1, 2, 3]), st.integers(33, 140), st.sampled_from([33, 64, 65, 128, 129]))
# At most 256 keys: that is one part of few queries' keys.
KEYS = st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 64, 65, 127, 128, 129]), st.integers(0, 256))
# Of rotations and merges, for whose kernels a number of tokens that is 1, or that 16 divides, is a variant.
UNEVEN = st.one_of(st.just(0), st.integers(1, 70).map(lambda half: 2 * half + 1))
# By what kernels are compiled for: no key unseen; one interval for all; one per sequence; bounds per row; a head kept.
SEEN = ("everything()", "causal()")
MOVING = ("causal()", "causal() & window(5)", "window(30, ahead=3)", "window(100)")
EACH = ("causal() & lengths", "window(40) & lengths", "causal() & window(7) & lengths", "lengths")
ROWS = ("prefix(4)", "prefix(50)", "chunks(7) & causal()", "chunks(64)", "documents", "documents & causal()")
KEEP = ("causal() & window(9, keep_first=3)", "window(20, keep_first=40) & causal()", "window(70, keep_first=1)")
ODD = st.sampled_from([72, 88, 104, 120])  # multiples of 8 and not of 16, padded to 128
EVEN = st.sampled_from([80, 96, 112])  # multiples of 16, padded to 128


def row(dtype: str, d: Any, e: Any, masks: tuple[str, ...], storage: str = "bhmd", **options: Any) -> dict[str, Any]:
    """Tie together what kernels are compiled for."""
    fixed = {"softcap": None, "sink": None, "alibi": None, "out_dtype": None}
    alike = {"k_storage": None, "v_storage": None, "d_out_storage": storage}
    scale = st.sampled_from([None, 0.25, 1.0, 0.0])
    return {"dtype": dtype, "d": d, "e": e, "mask": masks, "storage": storage, "scale": scale} | fixed | alike | options


WHOLE: Final = row("bfloat16", 128, 128, SEEN)
FINE: Final = row("float32", 64, 64, KEEP, "bmhd", sink=1.0, alibi=0.5)
RAGGED: Final = row("float16", 64, 64, EACH, "bmhd", sink=100.0)
ATTENTION: Final = (
    WHOLE,
    FINE,
    RAGGED,
    row("bfloat16", ODD, EVEN, ROWS, "bmhd", softcap=30.0),
    row("bfloat16", 256, 256, SEEN, "bmhd"),
    row("float16", 192, 128, MOVING),
    row("float16", 16, 16, SEEN, "expand", scale=-0.5),
)
# A law that changes the mask, repeats heads or packs sequences compiles kernels of its own: few rows of these.
FEW: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "keys_split_anywhere": (WHOLE, FINE, ATTENTION[3]),
    "keys_have_no_order": (WHOLE, ATTENTION[4], ATTENTION[6]),
    "groups_are_repeated_heads": (WHOLE, FINE),
    "wide_windows_are_causal": (WHOLE, ATTENTION[5]),
    "later_queries_stand_alone": (WHOLE, ATTENTION[4]),
    "blind_rows_are_zero": (WHOLE, RAGGED),
    "ragged_batches_are_separate_sequences": (WHOLE, RAGGED),
    "ragged_gradients_are_exact": (WHOLE, RAGGED),
    "pages_are_gathered_keys": (WHOLE, RAGGED),
    "appending_is_concatenation": (WHOLE, FINE),
}
STATES: Final = (WHOLE, FINE)  # rows of a merge differ in nothing but dtype and value dimension
FIXED: Final = {
    "keys_have_no_order": "everything()", "blind_rows_are_zero": "everything()", "wide_windows_are_causal": "causal()",
}  # fmt: skip


def alone(law: Law) -> bool:
    """Whether a law brings lengths, documents or places of its own."""
    return (
        law.operation in {"attention_varlen", "attention_paged", "append_"} or law.name == "later_queries_stand_alone"
    )


def merging(law: Law) -> bool:
    """Whether a law is about states."""
    return law.operation in {"merge", "add_sink"}


@st.composite
def attention_variants(draw: st.DrawFn, law: Law) -> Attention:
    """Draw a row, and everything that it leaves free."""
    chosen = dict(draw(st.sampled_from(STATES if merging(law) else FEW.get(law.name, ATTENTION)), label="row"))
    b = 1 if law.operation == "append_" else draw(st.integers(1, 3), label="b")
    m, n = (
        draw(UNEVEN if merging(law) else QUERIES, label="m"),
        draw(UNEVEN if law.operation == "append_" else KEYS, label="n"),
    )
    source = FIXED.get(law.name) or draw(st.sampled_from(SEEN if alone(law) else chosen["mask"]))
    moves = chosen["mask"] in {MOVING, ROWS, KEEP} and "documents" not in source
    chosen["mask"] = draw(mask_of(source, b, m, n), label="mask")
    chosen.update(UNPLACED)
    if law.name not in FIXED and not alone(law):
        if moves:
            chosen["q_offset"] = draw(st.one_of(st.none(), st.integers(-5, n + 5)), label="q_offset")
        elif "lengths" in source:
            each = st.tuples(*[st.integers(-5, n + 5)] * b)
            chosen["q_offset"] = draw(st.one_of(st.none(), each), label="q_offset of each")
        if chosen["q_offset"] is None:
            chosen["k_offset"] = draw(st.sampled_from([0, 0, 5, 2**20]), label="k_offset")
    if law.operation == "append_" or merging(law) or alone(law) or law.name in FIXED:
        chosen["dead"] = 0.0
    if "gradient" in law.name or law.name in {"dead_slots_change_nothing", "calls_repeat_bitwise"}:
        chosen.update(MILD)
    if merging(law):
        chosen.update(mean=0.0, sink=100.0)
    if law.name == "dead_slots_change_nothing" and chosen["storage"] == "expand":
        chosen.update(storage="bhmd", d_out_storage="bhmd")
    if law.operation in {"append_", "attention_paged"}:
        chosen["index"] = "int64"
    chosen["seed"] = draw(seeds(law, m, chosen), label="seed")
    return draw(attentions(b=b, g=2, r=draw(st.sampled_from([2, 3]), label="r"), m=m, n=n, **chosen))


@st.composite
def mask_of(draw: st.DrawFn, source: str, b: int, m: int, n: int) -> str:
    """Fill lengths and documents in."""
    if "lengths" in source:
        return source.replace("lengths", f"lengths({draw(st.lists(st.integers(0, n), min_size=b, max_size=b))})")
    if "documents" not in source:
        return source
    q_lengths, k_lengths = draw(splits(m)), draw(splits(n))
    count = min(len(q_lengths), len(k_lengths))
    return source.replace("documents", f"documents({q_lengths[:count]}, {k_lengths[:count]})")


@st.composite
def seeds(draw: st.DrawFn, law: Law, m: int, chosen: dict[str, Any]) -> int:
    """Draw a seed; where a law derives sizes from it, one whose sizes compile alike."""
    seed = draw(SEEDS)
    if law.name == "later_queries_stand_alone":  # it asks the last of them, from seed mod m + 1 on
        left = draw(st.one_of(st.integers(0, min(m, 3)), st.integers(min(m, 33), m)), label="later queries")
        return seed - seed % (m + 1) + (m - left)
    if law.operation == "append_":  # it turns 1 + seed mod d/2 planes
        half = chosen["d"] // 2
        return seed - seed % half + draw(st.sampled_from([half - 1, half // 4]), label="planes, less one")
    if law.operation == "attention_paged":  # its pages have seed mod the number of sizes
        return seed - seed % len(PAGES) + draw(st.sampled_from([PAGES.index(16), PAGES.index(48), PAGES.index(64)]))
    return seed


def turn(dtype: str, d: int, planes: int, pairing: str, storage: str, position: str, *, rows: bool) -> dict[str, Any]:
    """Tie together what a rotation is compiled for."""
    return {
        "dtype": dtype, "d": d, "planes": planes, "pairing": pairing, "storage": storage, "position": position,
        "rows": rows, "g": 2, "r": 2, "index": "int64", "m": UNEVEN,
    }  # fmt: skip


TURNS: Final = (
    turn("bfloat16", 128, 64, "half", "bmhd", "m", rows=False),
    turn("float16", 64, 32, "interleaved", "bhmd", "bm", rows=False),
    turn("float32", 80, 20, "half", "bmhd", "abm", rows=True),
)


@st.composite
def rotate_variants(draw: st.DrawFn, law: Law) -> Rotate:
    """Draw a row, and everything that it leaves free."""
    chosen = dict(draw(st.sampled_from(TURNS), label="row"))
    if law.name == "only_distance_matters":
        chosen.update(position="m", rows=False, largest=2**20)
    return draw(rotates(b=draw(st.integers(2, 3), label="b"), **chosen))


def variants(law: Law) -> Law:
    """State a law on these problems."""
    turning = law.operation in {"rotate", "rotate_qk", "rerotate"}
    return law._replace(problems=rotate_variants(law) if turning else attention_variants(law))


VARIANT_LAWS: Final = {law.name: variants(law) for law in LAWS}
