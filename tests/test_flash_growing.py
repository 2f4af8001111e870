"""Calls of `flash` that differ in sizes: a launch that is taken to other sizes is the launch that these would get."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from recorded_launches import LAUNCHES, Kernel, Launch

from longspan import backends
from longspan.backends import flash
from longspan.backends.flash import decode, decode_choices, forward, launch, paged_launch, plan, reach, rows
from longspan.backends.flash.choices import choose
from longspan.spec import masks
from longspan.spec.affine import affine

attending = import_module("longspan.backends.flash.attending")
hopper: Any = import_module("longspan.backends.hopper.attention")
hopper_forward = pytest.importorskip("longspan.backends.hopper.forward", exc_type=ImportError)
hopper_spans: Any = import_module("longspan.backends.hopper.spans")
BACKENDS = {"flash": flash, "hopper": hopper}
on_either = pytest.mark.parametrize("backend", BACKENDS)


interpreted = pytest.mark.skipif(not flash.INTERPRETED, reason="tensors on a CPU, which compiled kernels decline")


@pytest.fixture(autouse=True, params=["sm_90", "sm_80"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose as on a GPU, launch nothing, remember nothing from elsewhere."""
    arch = request.param
    for module, names in (
        (forward, ("forward_kernel",)), (decode, ("few_kernel", "few_merge_kernel")),
        (paged_launch, ("paged_kernel", "paged_merge_kernel")), (reach, ("sequences_kernel",)),
        (rows, ("rows_kernel",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name.removesuffix("_kernel")))
    monkeypatch.setattr(hopper_forward, "forward_kernel", Kernel("hopper.forward"))
    monkeypatch.setattr(hopper_forward, "processors", lambda _: 132)
    monkeypatch.setattr(hopper_spans, "spans_kernel", Kernel("spans"))
    # As on a GPU, all that it declines here is what the copy engine cannot address.
    declines = lambda *given, sink, **_: hopper.declines_heads(*given, sink)  # noqa: E731
    monkeypatch.setattr(hopper, "ATTENDING", hopper.ATTENDING._replace(declines=declines))
    monkeypatch.setattr(launch, "architecture", lambda: arch)
    # Choices that depend on all of their keys.
    monkeypatch.setattr(launch, "choose", lambda key: replace(choose(key), tile_n=16 << (hash(key) % 3)))
    monkeypatch.setattr(paged_launch, "gather", lambda *_: None)
    for module, name in ((decode, "few_key"), (paged_launch, "paged_key")):
        made = getattr(decode_choices, name)
        monkeypatch.setattr(
            module, name, lambda *args, made=made: replace(made(*args), architecture=arch, processors=132)
        )
    monkeypatch.setattr(decode, "INTERPRETED", False)
    monkeypatch.setattr(decode, "processors", lambda _: 132)
    plan.forget()
    yield
    plan.forget()


MASKS = {
    "everything": masks.everything, "causal": masks.causal, "window": lambda: masks.causal() & masks.window(70),
    "ahead": lambda: masks.window(300, ahead=9), "lengths": lambda: masks.causal() & masks.lengths([3, 500]),
    "documents": lambda: masks.causal() & masks.documents([3, 50], [30, 200]), "prefix": lambda: masks.prefix(9),
    "first": lambda: masks.causal() & masks.window(70, keep_first=4),
    "chunks": lambda: masks.documents(torch.tensor([[3, 50], [9, 1]])) & masks.chunks(20) & masks.chunks(30),
}  # fmt: skip
LAYOUTS = ("plain", "cache", "tokens first", "expanded", "of wider heads", "cache of wider heads")
ROOM = torch.zeros(2 * 4 * 6000 * 68, dtype=torch.float16)


def heads(count: int, tokens: int, d: int, layout: str) -> Tensor:
    """Heads [2, count, tokens, d], laid out in one of several ways."""
    if layout == "cache":
        return ROOM[: 2 * count * 6000 * d].view(2, count, 6000, d)[:, :, :tokens]
    if layout == "tokens first":
        return ROOM[: 2 * count * tokens * d].view(2, tokens, count, d).transpose(1, 2)
    if layout == "expanded":
        return ROOM[: 2 * tokens * d].view(2, 1, tokens, d).expand(2, count, tokens, d)
    if layout == "cache of wider heads":  # rows that the copy engine cannot address, but a single one
        return ROOM.view(2, 4, 6000, 68)[:, :count, :tokens, :d]
    if layout == "of wider heads":
        return ROOM[: 2 * count * tokens * (d + 4)].view(2, count, tokens, d + 4)[..., :d]
    return ROOM[: 2 * count * tokens * d].view(2, count, tokens, d)


# Tokens that are few, many, one, divided by 16 and not, and on both sides of where parts are counted anew.
TOKENS = st.one_of(st.sampled_from((1, 2, 16, 17, 128, 129, 255, 256, 257, 512, 513, 4096, 5000)), st.integers(1, 6000))
CALLS: dict[str, Any] = {
    "m": st.one_of(st.sampled_from((1, 2, 16, 33, 128, 300)), st.integers(1, 600)), "n": TOKENS,
    "q": st.sampled_from(LAYOUTS), "k": st.sampled_from(LAYOUTS), "q_offset": st.sampled_from((None, None, 0, 700)),
    "k_offset": st.sampled_from((0, 0, 3)),
}  # fmt: skip
GROWING = ("everything", "causal", "window", "lengths", "documents", "first")
FAMILY: dict[str, Any] = {
    "g": st.sampled_from((1, 4)), "d": st.sampled_from((24, 64)), "mask": st.sampled_from(sorted(MASKS)),
    "scale": st.sampled_from((None, -0.5)), "options": st.booleans(),
}  # fmt: skip


def call(ask: dict[str, Any], backend: str = "flash") -> list[Launch]:
    """Attend, and return what was launched."""
    q = heads(4, ask["m"], ask["d"], ask["q"])
    k, v = (heads(ask["g"], ask["n"], ask["d"], ask["k"]) for _ in "kv")
    options: dict[str, Any] = {"mask": MASKS[ask["mask"]](), "scale": ask["scale"]}
    if ask["options"]:
        options |= {"sink": torch.zeros(4), "softcap": 5.0}
    q_offset = None if ask["mask"] in {"documents", "chunks"} else ask["q_offset"]
    LAUNCHES.clear()
    with torch.no_grad():
        try:
            BACKENDS[backend].attention(q, k, v, **options, q_offset=q_offset, k_offset=ask["k_offset"])
        except backends.Unsupported:  # where the copy engine cannot go
            assert not LAUNCHES
    return list(LAUNCHES)


SIZE = {"m": 600, "q": "plain", "k": "cache of wider heads", "q_offset": None, "k_offset": 0}


@example(
    family={"g": 1, "d": 64, "mask": "everything", "scale": None, "options": False},
    sizes=[SIZE | {"n": 1}, SIZE | {"n": 2}],
)
@example(
    family={"g": 1, "d": 128, "mask": "causal", "scale": None, "options": False},
    sizes=[SIZE | {"n": n, "k": "plain"} for n in (2048, 2049)],
)
@example(
    family={"g": 4, "d": 64, "mask": "causal", "scale": None, "options": False},
    sizes=[SIZE | {"n": 650}, SIZE | {"n": 650, "q_offset": 700}],
)
@given(family=st.fixed_dictionaries(FAMILY), sizes=st.lists(st.fixed_dictionaries(CALLS), min_size=2, max_size=4))
@on_either
def test_a_launch_taken_to_other_sizes_is_the_launch_of_these(
    family: dict[str, Any], sizes: list[dict[str, Any]], backend: str
) -> None:
    plan.forget()
    grown = [call(family | size, backend) for size in sizes]
    for size, launched in zip(sizes, grown, strict=True):
        plan.forget()
        assert call(family | size, backend) == launched


@interpreted
@given(
    family=st.fixed_dictionaries(FAMILY | {"mask": st.sampled_from(GROWING)}),
    n=st.integers(700, 5900), m=st.sampled_from((1, 4, 600)), step=st.sampled_from((1, 2, 7)),
)  # fmt: skip
@on_either
def test_a_cache_that_grows_is_launched_by_the_code_that_is_there(
    family: dict[str, Any], n: int, m: int, step: int, backend: str
) -> None:
    assume((n - 1) // 256 == (n + step - 1) // 256)
    # Whole tiles of keys are other code, and so are tiles that end where the mask does.
    assume(backend == "flash" or all(x % 64 for x in (n, n - m, n + step, n + step - m)))
    plan.forget()
    size = {"m": m, "q": "plain", "k": "cache", "q_offset": None, "k_offset": 0}
    first = call(family | size | {"n": n}, backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attending, "lower", None)  # from here on, nothing is launched that is not known
        second = call(family | size | {"n": n + step}, backend)
    assert [(name, flags) for name, _, _, flags in first] == [(name, flags) for name, _, _, flags in second]
    assert first != second
    plan.forget()
    assert call(family | size | {"n": n + step}, backend) == second


@given(
    m=st.integers(1, 50), n=st.integers(1, 50), k_offset=st.integers(0, 9),
    terms=st.lists(st.sampled_from((masks.causal(), masks.window(3), masks.window(7, ahead=2))), max_size=3),
    q_offset=st.none() | st.integers(-60, 60),
)  # fmt: skip
def test_masks_are_lowered_as_the_definition_says(
    m: int, n: int, k_offset: int, terms: list[masks.Mask], q_offset: int | None
) -> None:
    mask = masks.everything()
    for term in terms:
        mask &= term
    told = reach.told(mask)
    assert told is not None
    low, high, stop, position, _ = reach.reach(told[0]).interval(m, n, q_offset, k_offset)
    assert affine(mask, m, n, q_offset=q_offset, k_offset=k_offset) == (low, high, stop, position)


PAGED_CALLS: dict[str, Any] = {
    "tokens": st.one_of(st.sampled_from((1, 2, 16, 17, 64)), st.integers(1, 300)), "b": st.sampled_from((1, 2, 15, 16)),
    "width": st.one_of(st.sampled_from((1, 8, 16, 17, 128, 800)), st.integers(1, 900)),
    "pages": st.sampled_from((1, 16, 40)), "wide": st.booleans(),
    "layout": st.sampled_from(("plain", "heads first", "wider", "odd pages")),
}  # fmt: skip
PAGED_FAMILY: dict[str, Any] = {
    "g": st.sampled_from((1, 4)), "page": st.sampled_from((16, 64)),
    "mask": st.sampled_from((masks.causal() & masks.window(70, keep_first=3), masks.chunks(9), masks.prefix(5))),
    "options": st.booleans(),
}  # fmt: skip
POOL = torch.zeros(40, 4, 64, 64, dtype=torch.float16)
POOLS = {
    "wider": torch.zeros(40, 4, 64, 68, dtype=torch.float16)[..., :64],
    "odd pages": torch.zeros(40 * 16388, dtype=torch.float16).as_strided((40, 4, 64, 64), (16388, 4096, 64, 1)),
}


def call_paged(ask: dict[str, Any]) -> list[Launch]:
    """Attend to pages, and return what was launched."""
    b, width = ask["b"], ask["width"]
    q = torch.zeros(ask["tokens"], 4, 64, dtype=torch.float16)
    if ask["layout"] == "heads first":
        q = torch.zeros(4, ask["tokens"], 64, dtype=torch.float16).transpose(0, 1)
    pages = POOLS.get(ask["layout"], POOL)[: ask["pages"], : ask["g"], : ask["page"]]
    table = torch.zeros(b, 900 if ask["wide"] else width, dtype=torch.int32)[:, :width]
    lengths = torch.zeros(b, dtype=torch.int32)
    options: dict[str, Any] = {"mask": ask["mask"]}
    if ask["options"]:
        options |= {"sink": torch.zeros(4), "softcap": 5.0}
    LAUNCHES.clear()
    with torch.no_grad():
        flash.attention_paged(
            q,
            lengths,
            pages,
            torch.empty_strided(pages.shape, pages.stride(), dtype=q.dtype),
            table,
            lengths,
            **options,
        )
    return list(LAUNCHES)


SIZE_PAGED = {"tokens": 200, "b": 15, "width": 800, "pages": 40, "wide": True, "layout": "plain"}


@example(
    family={"g": 1, "page": 64, "mask": masks.causal(), "options": False},
    sizes=[SIZE_PAGED, SIZE_PAGED | {"tokens": 300}, SIZE_PAGED | {"b": 16}],
)
@example(
    family={"g": 4, "page": 64, "mask": masks.causal(), "options": False},
    sizes=[SIZE_PAGED | {"layout": "odd pages", "pages": pages} for pages in (16, 1)],
)
@interpreted
@given(
    family=st.fixed_dictionaries(PAGED_FAMILY),
    sizes=st.lists(st.fixed_dictionaries(PAGED_CALLS), min_size=2, max_size=4),
)  # fmt: skip
def test_a_paged_launch_taken_to_other_sizes_is_the_launch_of_these(
    family: dict[str, Any], sizes: list[dict[str, Any]]
) -> None:
    plan.forget()
    grown = [call_paged(family | size) for size in sizes]
    for size, launched in zip(sizes, grown, strict=True):
        plan.forget()
        assert call_paged(family | size) == launched


@interpreted
def test_a_table_that_grows_is_launched_by_the_code_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = import_module("longspan.backends.flash.paged")
    ask = {
        "tokens": 3,
        "b": 2,
        "g": 4,
        "page": 16,
        "mask": masks.causal(),
        "options": False,
        "pages": 40,
        "wide": True,
        "layout": "plain",
    }
    first = call_paged(ask | {"width": 100})
    monkeypatch.setattr(paged, "run", None)
    second = call_paged(ask | {"width": 101})
    assert [x[0] for x in first] == [x[0] for x in second] == ["paged", "paged_merge"]
    assert first != second


@interpreted
def test_tensors_that_do_not_fit_are_refused_after_those_that_do() -> None:
    q, k = heads(4, 3, 64, "plain"), heads(4, 700, 64, "cache")
    pages, table, lengths = POOL[:, :, :16], torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    paged = torch.zeros(3, 4, 64, dtype=torch.float16)
    wrong = (ValueError, TypeError)  # the latter by whoever checks the specification's signatures
    with torch.no_grad():
        for _ in range(2):
            flash.attention(q, k, k)
            flash.attention_paged(paged, lengths, pages, pages, table, lengths)
        for other in (k[:, :, :699], k[:, :2], k[:1]):
            with pytest.raises(wrong, match=r"must be|Type-check"):
                flash.attention(q, k, other)
        for bad in ((pages[:9], table, lengths), (pages, table[:1], lengths), (pages, table, lengths[:1])):
            with pytest.raises(wrong, match=r"must be|Type-check"):
                flash.attention_paged(paged, lengths, pages, *bad)
