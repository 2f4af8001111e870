"""Calls of `flash` in sequence, launched from plans: right results, by the code that triton would have chosen."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from repeated_launches import REPEATED, repeat

from longspan.backends import eager, flash
from longspan.backends.flash import decode, growing, kin, paged_launch, plan, reach, rows
from longspan.spec import AttentionState, masks

attending = import_module("longspan.backends.flash.attending")
paged = import_module("longspan.backends.flash.paged")
pytestmark = pytest.mark.skipif(not flash.INTERPRETED, reason="launches are repeated in the interpreter")
STEPS = 5
Step = dict[str, Any]


@pytest.fixture(autouse=True)
def repeating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launch from plans that the interpreter repeats; remember nothing afterwards."""
    repeat(monkeypatch)
    yield
    plan.forget()


LAYOUTS = ("plain", "cache", "tokens first", "expanded", "odd rows", "odd origin")
MASKS = {
    "everything": lambda _: masks.everything(), "causal": lambda _: masks.causal(),
    "window": lambda _: masks.causal() & masks.window(70), "ahead": lambda _: masks.window(90, ahead=9),
    "prefix": lambda _: masks.prefix(5), "first": lambda _: masks.causal() & masks.window(50, keep_first=3),
    "documents": lambda x: masks.documents(torch.stack([x // 3, x], 1), torch.stack([x, x // 2], 1)) & masks.chunks(90),
    "lengths": lambda x: masks.causal() & masks.lengths(x),
}  # fmt: skip
PLAIN: Step = {
    "b": 2, "h": 2, "g": 1, "d": 16, "e": 16, "dtype": torch.float16, "mask": "causal", "scale": None, "softcap": None,
    "sink": False, "alibi": False, "out_dtype": None, "m": 1, "n": 260, "q": "plain", "k": "cache", "v": "cache",
    "q_offset": None, "k_offset": 0, "shared": False, "inference": False, "seed": 0,
}  # fmt: skip
# Sizes on both sides of what code, tiles or the number of parts depend on, and some that are in nothing special.
TOKENS = st.sampled_from((0, 1, 2, 15, 16, 100, 255, 256, 257, 260, 300, 513)) | st.integers(1, 600)
OPTIONS: dict[str, Any] = {
    "b": st.sampled_from((1, 2)), "g": st.sampled_from((1, 2)), "d": st.sampled_from((16, 24)),
    "e": st.sampled_from((16, 24)), "dtype": st.sampled_from((torch.float16, torch.float32)),
    "mask": st.sampled_from(sorted(MASKS)), "scale": st.sampled_from((None, 0.5, -0.5)),
    "softcap": st.sampled_from((None, 2.0)), "sink": st.booleans(), "alibi": st.booleans(),
    "out_dtype": st.sampled_from((None, torch.float32)),
}  # fmt: skip
SIZES: dict[str, Any] = {
    "m": st.sampled_from((0, 1, 1, 2, 16, 33, 128, 150)), "n": TOKENS,
    **{name: st.sampled_from(LAYOUTS) for name in "qkv"},
    "q_offset": st.sampled_from((None, None, 0, 200, -3, "tensor")), "k_offset": st.sampled_from((0, 0, 3)),
    "shared": st.booleans(), "inference": st.booleans(), "seed": st.integers(0, 3),
}  # fmt: skip
some = st.lists(st.fixed_dictionaries({}, optional=SIZES), min_size=2, max_size=STEPS)


def heads(x: Tensor, layout: str) -> Tensor:
    """Lay heads [b, h, tokens, d] out in one of several ways."""
    b, h, n, d = x.shape
    if layout == "cache":
        return torch.nn.functional.pad(x, (0, 0, 0, 640 - n), value=float("nan"))[:, :, :n]
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:, :1].expand(b, h, n, d)
    if layout == "odd rows":  # whose strides 16 bytes do not divide
        return torch.nn.functional.pad(x, (0, 1))[..., :d]
    if layout == "odd origin":
        return torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)
    return x


def outcome(backend: Any, step: Step) -> AttentionState:
    """Attend."""
    make = torch.Generator().manual_seed(step["seed"])
    b, h, g, n, d, e = (step[name] for name in ("b", "h", "g", "n", "d", "e"))
    with torch.inference_mode(step["inference"]), torch.no_grad():
        q, k, v = (
            heads(torch.randn(b, count, tokens, width, generator=make).to(step["dtype"]), step[name])
            for name, count, tokens, width in (("q", h, step["m"], d), ("k", g, n, d), ("v", g, n, e))
        )
        options = {name: step[name] for name in ("scale", "softcap", "q_offset", "k_offset", "out_dtype")}
        for name in ("sink", "alibi"):
            options[name] = torch.rand(h, generator=make) if step[name] else None
        if step["q_offset"] == "tensor":
            options["q_offset"] = torch.randint(0, n + 1, (b,), generator=make)
        if step["mask"] == "documents":
            options["q_offset"] = None
        lengths = torch.randint(0, n + step["k_offset"] + 1, (b,), generator=make)
        return backend.attention(
            q, k, k if step["shared"] and d == e else v, mask=MASKS[step["mask"]](lengths), **options
        )


def walk(steps: list[Step]) -> None:
    """Call with one after the other, and compare each with the specification's backend."""
    for step in steps:
        found, expected = outcome(flash, step), outcome(eager, step)
        assert found.out.dtype == expected.out.dtype
        assert found.out.is_inference() == step["inference"]
        torch.testing.assert_close(found.out, expected.out, rtol=0, atol=8e-3)
        torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=8e-3)


@settings(max_examples=max(1, settings().max_examples // 5))
@given(family=st.fixed_dictionaries(OPTIONS), other=st.fixed_dictionaries({}, optional=OPTIONS), sizes=some,
       turns=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))  # fmt: skip
def test_any_sequence_of_calls_is_right(family: Step, other: Step, sizes: list[Step], turns: list[bool]) -> None:
    plan.forget()
    walk([PLAIN | family | (other if turn else {}) | size for size, turn in zip(sizes, turns, strict=False)])


PAGED: Step = {
    "h": 2, "g": 1, "d": 16, "e": 16, "page": 16, "dtype": torch.float16, "integer": torch.int32, "mask": "causal",
    "scale": None, "softcap": None, "sink": False, "out_dtype": None, "queries": (1, 1), "width": 9, "spare": 0,
    "pool": "plain", "shared": False, "seed": 0,
}  # fmt: skip
PAGED_OPTIONS: dict[str, Any] = {
    "g": st.sampled_from((1, 2)), "d": st.sampled_from((16, 24)), "page": st.sampled_from((8, 64)),
    "dtype": st.sampled_from((torch.float16, torch.float32)), "integer": st.sampled_from((torch.int32, torch.int64)),
    "mask": st.sampled_from(("everything", "causal", "window", "prefix")), "scale": st.sampled_from((None, -0.5)),
    "softcap": st.sampled_from((None, 2.0)), "sink": st.booleans(), "out_dtype": st.sampled_from((None, torch.float32)),
}  # fmt: skip
PAGED_SIZES: dict[str, Any] = {
    "queries": st.lists(st.sampled_from((0, 1, 1, 2, 9)), min_size=1, max_size=3).map(tuple),
    "width": st.integers(1, 9), "spare": st.sampled_from((0, 1, 3)), "pool": st.sampled_from(LAYOUTS),
    "shared": st.booleans(), "seed": st.integers(0, 3),
}  # fmt: skip
some_paged = st.lists(st.fixed_dictionaries({}, optional=PAGED_SIZES), min_size=2, max_size=STEPS)


def outcome_paged(backend: Any, step: Step) -> AttentionState:
    """Attend to pages."""
    make = torch.Generator().manual_seed(step["seed"])
    b, width, page, integer = len(step["queries"]), step["width"], step["page"], step["integer"]
    q = torch.randn(sum(step["queries"]), step["h"], step["d"], generator=make).to(step["dtype"])
    pools = [
        heads(torch.randn(b * width, step["g"], page, step[name], generator=make).to(step["dtype"]), step["pool"])
        for name in "de"
    ]  # fmt: skip
    table = torch.randperm(b * width, generator=make).view(b, width).to(integer)
    table = torch.nn.functional.pad(table, (0, step["spare"]))[:, :width]
    lengths = torch.randint(0, width * page + 1, (b,), generator=make).to(integer)
    options = {name: step[name] for name in ("scale", "softcap", "out_dtype")}
    options["sink"] = torch.rand(step["h"], generator=make) if step["sink"] else None
    k, v = (pools[0], pools[0]) if step["shared"] and step["d"] == step["e"] else pools
    with torch.no_grad():
        return backend.attention_paged(
            q, torch.tensor(step["queries"], dtype=integer), k, v, table, lengths, mask=MASKS[step["mask"]](None),
            **options,
        )  # fmt: skip


def walk_paged(steps: list[Step]) -> None:
    """See `walk`."""
    for step in steps:
        found, expected = outcome_paged(flash, step), outcome_paged(eager, step)
        assert found.out.dtype == expected.out.dtype
        torch.testing.assert_close(found.out, expected.out, rtol=0, atol=8e-3)
        torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=8e-3)


@settings(max_examples=max(1, settings().max_examples // 15))
@given(family=st.fixed_dictionaries({}, optional=PAGED_OPTIONS), sizes=some_paged,
       other=st.fixed_dictionaries({}, optional=PAGED_OPTIONS),
       turns=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))  # fmt: skip
def test_any_sequence_of_calls_on_pages_is_right(
    family: Step, other: Step, sizes: list[Step], turns: list[bool]
) -> None:
    plan.forget()
    walk_paged([PAGED | family | (other if turn else {}) | size for size, turn in zip(sizes, turns, strict=False)])


# In turn: each asks for what was planned for another.
CALLS: list[Step] = [
    PLAIN | step for step in (
        {}, {"n": 261}, {"n": 259}, {"n": 270, "scale": 0.5}, {"n": 270}, {"n": 270, "out_dtype": torch.float32},
        {"k": "odd rows"}, {"m": 2}, {"m": 16}, {"m": 150, "n": 255}, {"m": 16}, {"mask": "lengths", "n": 300},
        {"mask": "lengths"}, {"k": "odd origin"}, {"n": 270, "shared": True}, {"n": 270},
        {"n": 30}, {"n": 29}, {"n": 20}, {"mask": "lengths", "q_offset": 200}, {"mask": "lengths", "q_offset": 100},
        {"mask": "documents", "seed": 1}, {"mask": "documents", "seed": 2}, {"mask": "documents", "n": 259},
        {"mask": "first", "m": 150}, {"mask": "first", "m": 149}, {"mask": "first", "m": 149, "k_offset": 3},
    )
]  # fmt: skip
CALLS_PAGED: list[Step] = [
    PAGED | step for step in (
        {}, {"width": 8}, {"width": 8, "scale": 0.5}, {"queries": (2, 1)}, {"queries": (1, 3)}, {"pool": "odd rows"},
        {"shared": True},
    )
]  # fmt: skip


def test_calls_in_turn_are_right_and_launched_from_plans() -> None:
    walk(CALLS)
    walk_paged(CALLS_PAGED)
    assert set(REPEATED) == {
        "few_kernel", "few_merge_kernel", "forward_kernel", "sequences_kernel", "rows_kernel", "paged_kernel",
        "paged_merge_kernel",
    }  # fmt: skip


def asked_without(related: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Split a call as if one option were never given."""
    return lambda *given: related(*given[:place], None, *given[place + 1 :])


def remembered_interval(known: dict[Any, Any], interval: Callable[..., Any]) -> Callable[..., Any]:
    """Lower a mask as for the keys that there were first."""
    return lambda sees, m, n, *offsets: known.setdefault((sees, m, offsets), interval(sees, m, n, *offsets))


PAGING = (paged, paged_launch, paged_launch.Repeated)
MUTANTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "strides are not told apart": (growing, "kinds", lambda _: lambda *_: ()),
    "strides of pages are not told apart": (paged_launch, "kinds", lambda _: lambda *_: ()),
    "sizes are one form": (attending, "form", lambda _: lambda *_: 0),
    "a scale is not in the key": (attending, "asked", lambda whole: asked_without(whole, 4)),
    "a dtype is not in the key": (attending, "asked", lambda whole: asked_without(whole, 10)),
    "a scale of pages is not in the key": (paged, "related", lambda whole: asked_without(whole, 7)),
    "masks do not grow": (reach.Reach, "interval", lambda whole: remembered_interval({}, whole)),
    "lengths are lowered as they were": (reach.Each, "resized", lambda _: lambda each, *_: each),
    "caches do not grow": (decode.Repeated, "longer", lambda _: lambda repeated, *_: repeated),
    "rows are lowered as they were": (rows.Rows, "resized", lambda _: lambda lowered, *_: lowered),
    "any sizes are the last": (kin.Kin, "find", lambda _: lambda known, _: known.last[1]),
    "tables do not grow": (paged_launch.Repeated, "resized", lambda _: lambda repeated, *_: repeated),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_plan_that_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, mutate = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, mutate(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        walk_paged(CALLS_PAGED) if owner in PAGING else walk(CALLS)
