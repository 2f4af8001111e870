"""Calls of `flash` that differ in sizes: a launch that is taken to other sizes is the launch that these would get."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from longspan.backends import flash
from longspan.backends.flash import decode, decode_choices, forward, launch, paged_launch, plan, reach
from longspan.spec import masks
from longspan.spec.affine import affine

attention = import_module("longspan.backends.flash.attention")  # the package gives that name to the function
Launch = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
LAUNCHES: list[Launch] = []
ALIGNED = 16


class Bound:
    """Stands for a launch that can be repeated, and taken to other sizes; writes down what that launches."""

    def __init__(self, name: str, grid: tuple[int, ...], args: tuple[Any, ...], flags: dict[str, Any]) -> None:
        self.name, self.grid, self.flags = name, grid, flags
        self.count = next(i for i, x in enumerate(args) if isinstance(x, int | float))
        self.described = {i: layout(x) for i, x in enumerate(args[: self.count]) if hasattr(x, "block_shape")}
        self.blocks = {i: tuple(args[i].block_shape) for i in self.described}
        self.none = [x is None for x in args[: self.count]]
        self.numbers = args[self.count :]

    def resized(self, grid: tuple[int, ...], numbers: tuple[Any, ...], *tensors: Tensor) -> "Bound":
        """Take it to other sizes."""
        other = object.__new__(Bound)
        vars(other).update(vars(self))
        other.grid, other.numbers = grid, numbers
        other.described = {i: plan.layout_described(tensors[i]) for i in self.described}
        return other

    def __call__(self, *addresses: int) -> bool:
        """Repeat it."""
        assert len(addresses) == self.count
        assert all(x % ALIGNED == 0 for x in addresses)
        if self.name != "sequences":  # whose lengths or offsets are one of them none
            assert [x == 0 for x, none in zip(addresses, self.none, strict=True) if none] == [True] * sum(self.none)
        LAUNCHES.append((self.name, self.grid, told(self), self.flags))
        return True


def layout(x: Any) -> tuple[list[int], list[int]]:
    """Shape and strides of a descriptor."""
    return list(x.shape), list(x.strides)


def told(of: Bound) -> tuple[Any, ...]:
    """All of a launch but its grid, its flags and addresses."""
    return (*of.numbers, *of.described.items(), *of.blocks.items(), *of.none)


def base(x: Any) -> Any:
    """The tensor of a descriptor, or what was given."""
    return x.base if hasattr(x, "block_shape") else x


class Kernel:
    """Writes launches down and runs nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*args: Any, **flags: Any) -> Bound | None:
            bound = Bound(self.name, grid, args, flags)
            LAUNCHES.append((self.name, grid, told(bound), flags))
            tensors = [base(x) for x in args if isinstance(base(x), Tensor)]
            return bound if all(x.data_ptr() % ALIGNED == 0 for x in tensors) else None

        return launched


@pytest.fixture(autouse=True, params=["sm_90", "sm_80"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose as on a GPU, launch nothing, remember nothing from elsewhere."""
    arch = request.param
    for module, names in (
        (forward, ("forward_kernel",)), (decode, ("few_kernel", "few_merge_kernel")),
        (paged_launch, ("paged_kernel", "paged_merge_kernel")), (reach, ("sequences_kernel",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name.removesuffix("_kernel")))
    monkeypatch.setattr(launch, "architecture", lambda: arch)
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


def specialised(x: Any) -> Any:
    """What triton may compile for of a number, of any argument: more than it does."""
    return (x == 1, x % ALIGNED == 0, not -(2**31) <= x < 2**31) if type(x) is int else type(x)


def alike(one: list[Launch], other: list[Launch], free: dict[str, set[int]]) -> bool:
    """Whether the same code is launched: numbers in ``free`` are not specialised but for their width."""

    def code(launches: list[Launch]) -> Any:
        return [
            (name, [specialised(x)[2:] if i in free[name] and type(x) is int else specialised(x)
                    for i, x in enumerate(args) if isinstance(x, int | float)],
             [x for x in args if isinstance(x, bool)], sorted(flags.items()))
            for name, _, args, flags in launches
        ]  # fmt: skip

    return code(one) == code(other)


MASKS = {
    "everything": masks.everything, "causal": masks.causal, "window": lambda: masks.causal() & masks.window(70),
    "ahead": lambda: masks.window(300, ahead=9), "lengths": lambda: masks.causal() & masks.lengths([3, 500]),
}  # fmt: skip
LAYOUTS = ("plain", "cache", "tokens first", "expanded")
ROOM = torch.zeros(2 * 4 * 6000 * 64, dtype=torch.float16)


def heads(count: int, tokens: int, d: int, layout: str) -> Tensor:
    """Heads [2, count, tokens, d], laid out in one of several ways."""
    if layout == "cache":
        return ROOM[: 2 * count * 6000 * d].view(2, count, 6000, d)[:, :, :tokens]
    if layout == "tokens first":
        return ROOM[: 2 * count * tokens * d].view(2, tokens, count, d).transpose(1, 2)
    if layout == "expanded":
        return ROOM[: 2 * tokens * d].view(2, 1, tokens, d).expand(2, count, tokens, d)
    return ROOM[: 2 * count * tokens * d].view(2, count, tokens, d)


# Tokens that are few, many, one, divided by 16 and not, and on both sides of where parts are counted anew.
TOKENS = st.one_of(st.sampled_from((1, 2, 16, 17, 128, 129, 255, 256, 257, 512, 513, 4096, 5000)), st.integers(1, 6000))
CALLS: dict[str, Any] = {
    "m": st.one_of(st.sampled_from((1, 2, 16, 33, 128, 300)), st.integers(1, 600)), "n": TOKENS,
    "q": st.sampled_from(LAYOUTS), "k": st.sampled_from(LAYOUTS), "q_offset": st.sampled_from((None, None, 0, 700)),
    "k_offset": st.sampled_from((0, 0, 3)),
}  # fmt: skip
FAMILY: dict[str, Any] = {
    "g": st.sampled_from((1, 4)), "d": st.sampled_from((24, 64)), "mask": st.sampled_from(sorted(MASKS)),
    "scale": st.sampled_from((None, -0.5)), "options": st.booleans(),
}  # fmt: skip


def call(ask: dict[str, Any]) -> list[Launch]:
    """Attend, and return what was launched."""
    q = heads(4, ask["m"], ask["d"], ask["q"])
    k, v = (heads(ask["g"], ask["n"], ask["d"], ask["k"]) for _ in "kv")
    options: dict[str, Any] = {"mask": MASKS[ask["mask"]](), "scale": ask["scale"]}
    if ask["options"]:
        options |= {"sink": torch.zeros(4), "softcap": 5.0}
    LAUNCHES.clear()
    with torch.no_grad():
        flash.attention(q, k, v, **options, q_offset=ask["q_offset"], k_offset=ask["k_offset"])
    return list(LAUNCHES)


# Arguments after addresses whose values are not specialised, by kernel.
FREE = {
    "forward": {9, 10, 13, 14, *range(17, 23)}, "few": {9, 10, 13, 14, *range(17, 23), 26}, "few_merge": {0, 2, 4},
    "sequences": set(range(9)),
}  # fmt: skip


@given(family=st.fixed_dictionaries(FAMILY), sizes=st.lists(st.fixed_dictionaries(CALLS), min_size=2, max_size=4))
def test_a_launch_taken_to_other_sizes_is_the_launch_of_these(
    family: dict[str, Any], sizes: list[dict[str, Any]]
) -> None:
    plan.forget()
    grown = [call(family | size) for size in sizes]
    for size, launched in zip(sizes, grown, strict=True):
        plan.forget()
        assert call(family | size) == launched


@given(
    family=st.fixed_dictionaries(FAMILY | {"mask": st.sampled_from(("everything", "causal", "window", "lengths"))}),
    n=st.integers(700, 5900), m=st.sampled_from((1, 4, 600)), step=st.sampled_from((1, 2, 7)),
)  # fmt: skip
def test_a_cache_that_grows_is_launched_by_the_code_that_is_there(
    family: dict[str, Any], n: int, m: int, step: int
) -> None:
    assume((n - 1) // 256 == (n + step - 1) // 256)
    plan.forget()
    size = {"m": m, "q": "plain", "k": "cache", "q_offset": None, "k_offset": 0}
    first = call(family | size | {"n": n})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "launch_call", None)  # from here on, nothing is launched that is not known
        patch.setattr(attention, "lower", None)
        second = call(family | size | {"n": n + step})
    assert alike(first, second, FREE)
    assert first != second


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
    "width": st.one_of(st.sampled_from((1, 8, 16, 17, 128)), st.integers(1, 300)),
    "pages": st.sampled_from((1, 16, 40)), "wide": st.booleans(),
}  # fmt: skip
PAGED_FAMILY: dict[str, Any] = {
    "g": st.sampled_from((1, 4)), "page": st.sampled_from((16, 64)),
    "mask": st.sampled_from((masks.causal() & masks.window(70, keep_first=3), masks.chunks(9), masks.prefix(5))),
    "options": st.booleans(),
}  # fmt: skip
PAGES = torch.zeros(40, 4, 64, 64, dtype=torch.float16)


def call_paged(ask: dict[str, Any]) -> list[Launch]:
    """Attend to pages, and return what was launched."""
    b, width = ask["b"], ask["width"]
    q = torch.zeros(ask["tokens"], 4, 64, dtype=torch.float16)
    pages = PAGES[: ask["pages"], : ask["g"], : ask["page"]]
    table = torch.zeros(b, 400 if ask["wide"] else width, dtype=torch.int32)[:, :width]
    lengths = torch.zeros(b, dtype=torch.int32)
    options: dict[str, Any] = {"mask": ask["mask"]}
    if ask["options"]:
        options |= {"sink": torch.zeros(4), "softcap": 5.0}
    LAUNCHES.clear()
    with torch.no_grad():
        flash.attention_paged(q, lengths, pages, pages.clone(), table, lengths, **options)
    return list(LAUNCHES)


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


def test_a_table_that_grows_is_launched_by_the_code_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = import_module("longspan.backends.flash.paged")
    ask = {"tokens": 3, "b": 2, "g": 4, "page": 16, "mask": masks.causal(), "options": False, "pages": 40, "wide": True}
    first = call_paged(ask | {"width": 100})
    monkeypatch.setattr(paged, "run", None)
    second = call_paged(ask | {"width": 101})
    assert [x[0] for x in first] == [x[0] for x in second] == ["paged", "paged_merge"]
    assert first != second
