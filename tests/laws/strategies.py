"""Hypothesis strategies: which problems a law is tried on.

Sizes cover 0, 1, primes and both sides of every tile boundary; every head dimension class; every mask and every
legal join; extreme logits; needles; NaN and infinity in dead slots.
"""

from typing import Any

from hypothesis import strategies as st

from .problems import Attention, Rotate

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 131]), st.integers(0, 140)
)
TINY = st.integers(1, 3)  # first among alternatives: what a long counterexample can shrink to
# One of every class: below a tile, odd multiples of 8, powers of two, two thirds of one, beyond 128.
HEAD_DIMS = st.sampled_from([8, 16, 24, 32, 40, 64, 80, 96, 128, 192, 256])
# For batches and groups that are large: their cost is in their heads.
FEW = st.sampled_from([0, 1, 2, 3, 7, 16, 17, 33])
STORAGES = st.sampled_from(["bhmd", "bmhd", "slice", "expand"])
OTHER_STORAGES = st.one_of(st.none(), STORAGES)
# Mostly all; sometimes what a frozen cache, a frozen model or a probe of one argument needs.
TRAINED = st.sampled_from(["qkvs", "qkvs", "qkvs", "q", "k", "v", "kv", "qv", "qks", "vs"])
INDICES = st.sampled_from(["int32", "int64"])
FAR = 2**20


@st.composite
def splits(draw: st.DrawFn, total: int) -> list[int]:
    """Cut a total into lengths, some of them 0, that may leave a rest over."""
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=1, max_size=4), label="cuts"))
    return [stop - start for start, stop in zip([0, *cuts], cuts, strict=False)]


KINDS = (
    [], ["causal"], ["causal"], ["causal"], ["window"], ["ahead"], ["keep"], ["keep ahead"], ["prefix"], ["chunks"],
    ["causal", "window"], ["causal", "chunks"], ["causal", "keep"], ["causal", "keep ahead"], ["window", "chunks"],
    ["causal", "window", "chunks"], ["prefix", "window"], ["prefix", "ahead"], ["prefix", "chunks"],
    ["prefix", "keep ahead"],
)  # fmt: skip


def term(kind: str, n: int) -> st.SearchStrategy[str]:
    """Draw the source of one term of a mask over n keys."""
    size, ahead = st.integers(1, max(n, 1) + 2), st.integers(0, n + 1)
    return {
        "causal": st.just("causal()"),
        "window": st.builds("window({})".format, size),
        "ahead": st.builds("window({}, ahead={})".format, size, ahead),
        "keep": st.builds("window({}, keep_first={})".format, size, size),
        "keep ahead": st.builds("window({}, ahead={}, keep_first={})".format, size, ahead, size),
        "prefix": st.builds("prefix({})".format, ahead),
        "chunks": st.builds("chunks({})".format, size),
    }[kind]


@st.composite
def frames(draw: st.DrawFn, b: int, m: int, n: int) -> list[str]:
    """Draw what sets lengths: nothing, a length per sequence, or documents, alike or different in each sequence."""
    match draw(st.sampled_from(["none", "none", "lengths", "documents", "documents each"]), label="frame"):
        case "lengths":
            return [f"lengths({draw(st.lists(st.integers(0, n), min_size=b, max_size=b), label='lengths')})"]
        case "documents":
            q_lengths, k_lengths = draw(splits(m)), draw(splits(n))
            count = min(len(q_lengths), len(k_lengths))
            return [f"documents({q_lengths[:count]}, {k_lengths[:count]})"]
        case "documents each":
            rows = [(draw(splits(m)), draw(splits(n))) for _ in range(b)]
            longest = max(len(lengths) for row in rows for lengths in row)
            q_rows, k_rows = ([[*x, *[0] * (longest - len(x))] for x in side] for side in zip(*rows, strict=True))
            return [f"documents(tensor({q_rows}), tensor({k_rows}))"]
        case _:
            return []


@st.composite
def mask_sources(draw: st.DrawFn, b: int, m: int, n: int) -> str:
    """Draw the source of a mask that fits the sizes: one term, or a legal join of several."""
    if draw(st.integers(0, 7), label="spans if 7") == 7:
        return draw(span_sources(b, m, n))
    terms = [*draw(frames(b, m, n)), *(draw(term(kind, n)) for kind in draw(st.sampled_from(KINDS), label="kinds"))]
    return " & ".join(draw(st.permutations(terms))) or "everything()"


@st.composite
def span_sources(draw: st.DrawFn, b: int, m: int, n: int) -> str:
    """Draw explicit spans, nondecreasing along the rows as kernels want them."""
    if m == 0:
        return "everything()"
    edges = [sorted(draw(st.lists(st.integers(0, n), min_size=m, max_size=m))) for _ in range(2)]
    first = [min(pair) for pair in zip(*edges, strict=True)]
    last = [max(pair) for pair in zip(*edges, strict=True)]
    if b > 1 and draw(st.booleans()):
        return f"spans(tensor({[first] * b}), tensor({[last] * b}))"
    return f"spans(tensor({first}), tensor({last}))"


@st.composite
def attentions(draw: st.DrawFn, **fixed: Any) -> Attention:
    """Draw an attention problem; keyword arguments fix fields, or say what to draw them from."""

    def choose(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        chosen = fixed.get(name, strategy)
        return draw(chosen, label=name) if isinstance(chosen, st.SearchStrategy) else chosen

    b, g = choose("b", st.sampled_from([1, 1, 2, 3, 5])), choose("g", st.integers(1, 2))
    r = choose("r", st.sampled_from([1, 1, 2, 3, 4, 7, 8, 16]))
    lengths = FEW if b * r > 8 else LENGTHS
    m = choose("m", lengths)
    n = choose("n", st.one_of(lengths, st.just(m)))
    h = g * r
    d = choose("d", HEAD_DIMS)
    e = choose("e", st.one_of(st.just(d), st.just(d), HEAD_DIMS))
    mask = choose("mask", mask_sources(b, m, n))
    k_offset = choose("k_offset", st.sampled_from([0, 0, 0, 1, 5, FAR]))
    somewhere = st.integers(-5, n + 5).map(lambda offset: offset + (k_offset if k_offset == FAR else 0))
    placed = st.one_of(st.none(), st.none(), somewhere, st.tuples(*[somewhere] * b))
    placed = st.none() if "documents" in mask else placed
    dtype = choose("dtype", DTYPES)
    return Attention(
        b=b, h=h, g=g, m=m, n=n, d=d, e=e, dtype=dtype, mask=mask,
        scale=choose("scale", st.sampled_from([None, None, 0.25, 1.0, -0.5, 0.0])),
        softcap=choose("softcap", st.sampled_from([None, None, None, 1.0, 30.0])),
        sink=choose("sink", st.sampled_from([None, None, 0.0, 1.0, 100.0])),
        alibi=choose("alibi", st.sampled_from([None, None, None, 0.5])),
        q_offset=choose("q_offset", placed),
        k_offset=k_offset,
        out_dtype=choose("out_dtype", st.sampled_from([None, None, None, "float32" if dtype != "float64" else None])),
        storage=choose("storage", STORAGES),
        k_storage=choose("k_storage", OTHER_STORAGES),
        v_storage=choose("v_storage", OTHER_STORAGES),
        d_out_storage=choose("d_out_storage", STORAGES),
        trained=choose("trained", TRAINED),
        index=choose("index", INDICES),
        amplitude=choose("amplitude", st.sampled_from([1.0, 1.0, 1.0, 0.0, 3.0, 10.0])),
        mean=choose("mean", st.sampled_from([0.0, 0.0, 100.0])),
        needle=choose("needle", st.booleans()),
        dead=choose("dead", st.sampled_from([0.0, float("nan"), float("inf")])),
        seed=choose("seed", SEEDS),
    )  # fmt: skip


# Sizes for an interpreter, where a tile costs a tenth of a second: both sides of the smallest tile, and no more.
SMALL: dict[str, Any] = {
    "b": st.integers(1, 2),
    "m": st.sampled_from([0, 1, 2, 7, 16, 17, 33]),
    "n": st.sampled_from([0, 1, 2, 7, 16, 17, 33, 65]),
    "d": st.sampled_from([8, 16, 24, 64]),
    "e": st.sampled_from([8, 16, 24, 64]),
    "r": st.sampled_from([1, 2]),
}

# What every backend is asked most often: nothing that some backend is entitled to decline.
PLAIN = {"softcap": None, "alibi": None, "scale": None, "q_offset": None, "k_offset": 0, "out_dtype": None}


@st.composite
def decodes(draw: st.DrawFn) -> Attention:
    """Draw a few queries against a long cache: decoding, speculation, a prompt's last chunk."""
    m, n = draw(st.integers(1, 5), label="m"), draw(st.one_of(TINY, *[st.integers(500, 6000)] * 4), label="n")
    d = draw(st.sampled_from([64, 128]), label="d")
    return draw(attentions(m=m, n=n, d=d, e=d, b=draw(st.integers(1, 2), label="b")))


@st.composite
def prefills(draw: st.DrawFn, **fixed: Any) -> Attention:
    """Draw one head of many tokens: more than a tile of anything, and the last of them cut."""
    long = st.sampled_from([193, 255, 256, 257, 300, 513])
    m, n = (draw(st.one_of(TINY, *[long] * 4), label=name) for name in "mn")
    return draw(attentions(**{**fixed, "b": 1, "g": 1, "r": 1, "m": m, "n": n, "d": 64, "e": 64}))


@st.composite
def rotates(draw: st.DrawFn, **fixed: Any) -> Rotate:
    """Draw a rotation problem; keyword arguments fix fields, or say what to draw them from."""

    def choose(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        chosen = fixed.get(name, strategy)
        return draw(chosen, label=name) if isinstance(chosen, st.SearchStrategy) else chosen

    g = choose("g", st.integers(1, 2))
    d = choose("d", HEAD_DIMS)
    return Rotate(
        b=choose("b", st.integers(1, 3)), g=g, h=g * choose("r", st.sampled_from([1, 2, 5, 16])),
        m=choose("m", st.one_of(LENGTHS, LENGTHS, st.sampled_from([193, 256, 257, 600]))), d=d,
        planes=choose("planes", st.one_of(st.just(d // 2), st.integers(1, d // 2))),
        dtype=choose("dtype", DTYPES),
        pairing=choose("pairing", st.sampled_from(["half", "interleaved"])),
        position=choose("position", st.sampled_from(["m", "bm", "abm"])),
        largest=choose("largest", st.sampled_from([1, 4096, 2**20, 2**31 - 1])),
        base=choose("base", st.sampled_from([1e4, 5e5, 100.0])),
        attention_factor=choose("attention_factor", st.sampled_from([1.0, 1.3465735902799727, 0.5])),
        rows=choose("rows", st.booleans()),
        factors=choose("factors", st.booleans()),
        index=choose("index", INDICES),
        storage=choose("storage", STORAGES),
        seed=choose("seed", SEEDS),
    )  # fmt: skip
