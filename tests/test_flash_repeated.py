"""Calls of `flash` that are remembered: only what is launched alike is taken for alike, and errors stay errors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from longspan import autotune, spec
from longspan.backends import flash
from longspan.backends.flash import attending, forward, function, plan, rope, rope_kernel
from longspan.spec import masks

# Nothing is launched here, by tensors on a CPU, which compiled kernels decline.
pytestmark = pytest.mark.skipif(not flash.INTERPRETED, reason="needs TRITON_INTERPRET=1")

Launch = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]
LAUNCHES: list[Launch] = []
AGAIN: list[tuple[int, ...]] = []


class Bound:
    """Stands for a launch that can be repeated; writes addresses down."""

    def __call__(self, *addresses: int) -> bool:
        """Repeat it."""
        AGAIN.append(addresses)
        return True


class Kernel:
    """Writes launches down and runs nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **flags: Any) -> Bound:
            LAUNCHES.append((grid, args, flags))
            return Bound()

        return launch


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launch nothing, remember nothing from elsewhere."""
    monkeypatch.setattr(forward, "forward_kernel", Kernel())
    monkeypatch.setattr(rope_kernel, "rotate_kernel", Kernel())
    monkeypatch.setattr(function.decode, "few", lambda *_: False)
    plan.forget()
    yield
    plan.forget()


def told(launch: Launch) -> Any:
    """All of a launch but addresses."""
    grid, args, flags = launch

    def of(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.dtype, x.data_ptr() % 16
        if hasattr(x, "block_shape"):
            return of(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape)
        return x

    return grid, [of(x) for x in args], flags


def heads(count: int, tokens: int, d: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Heads [2, count, tokens, d], laid out in one of several ways."""
    if layout == "tokens first":
        return torch.zeros(2, tokens, count, d, dtype=dtype).transpose(1, 2)
    if layout == "part of a cache":
        return torch.zeros(2, count, tokens + 5, d, dtype=dtype)[:, :, :tokens]
    if layout == "expanded":
        return torch.zeros(2, 1, tokens, d, dtype=dtype).expand(2, count, tokens, d)
    if layout == "of wider heads":
        return torch.zeros(2, count, tokens, d + 8, dtype=dtype)[..., :d]
    return torch.zeros(2, count, tokens, d, dtype=dtype)


LAYOUTS = ("plain", "tokens first", "part of a cache", "expanded", "of wider heads")
MASKS = {
    "everything": masks.everything, "causal": masks.causal, "window": lambda: masks.causal() & masks.window(3),
    "another window": lambda: masks.causal() & masks.window(4), "ahead": lambda: masks.window(3, ahead=1),
    "prefix": lambda: masks.prefix(2), "lengths": lambda: masks.causal() & masks.lengths([3, 5]),
}  # fmt: skip
CHOICES: dict[str, Any] = {
    "h": (2, 4), "g": (1, 2), "m": (1, 5, 16), "n": (5, 16), "d": (8, 16, 24), "e": (16,),
    "dtype": (torch.float16, torch.bfloat16), "q": LAYOUTS, "k": LAYOUTS, "v": LAYOUTS, "mask": tuple(MASKS),
    "scale": (None, 0.5, -0.5, 0.0), "softcap": (None, 5.0), "sink": (None, torch.float32, torch.bfloat16),
    "alibi": (None, torch.float32), "q_offset": (None, 0, 3), "k_offset": (0, 2),
    "out_dtype": (None, torch.float32, torch.float16),
}  # fmt: skip
asks = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})


def call(ask: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Make tensors and options of what was drawn."""
    dtype, d = ask["dtype"], ask["d"]
    tensors = (
        heads(ask["h"], ask["m"], d, dtype, ask["q"]), heads(ask["g"], ask["n"], d, dtype, ask["k"]),
        heads(ask["g"], ask["n"], ask["e"], dtype, ask["v"]),
    )  # fmt: skip
    options = {name: ask[name] for name in ("scale", "softcap", "q_offset", "k_offset", "out_dtype")}
    for name in ("sink", "alibi"):
        options[name] = None if ask[name] is None else torch.zeros(ask["h"], dtype=ask[name])
    return tensors, {"mask": MASKS[ask["mask"]](), **options}


def given_to(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> list[Any]:
    """Arguments of a call, in the order of those who remember it."""
    names = ("mask", "scale", "softcap", "sink", "alibi", "q_offset", "k_offset", "out_dtype")
    return [*tensors, *(options[name] for name in names)]


def key_of(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """What the call is remembered as: all but its sizes, and these; None if it is not."""
    ask = attending.asked(*given_to(tensors, options))
    return ask and ask[:2]


def launch_of(ask: dict[str, Any]) -> Any:
    """What is launched for a call that nothing is known of."""
    plan.forget()
    LAUNCHES.clear()
    tensors, options = call(ask)
    with torch.no_grad():
        flash.attention(*tensors, **options)
    assert len(LAUNCHES) == 1
    return told(LAUNCHES[0])


@given(first=asks, swap=st.sets(st.sampled_from(sorted(CHOICES)), max_size=2), second=asks)
def test_calls_of_one_key_are_launched_alike(first: dict[str, Any], swap: set[str], second: dict[str, Any]) -> None:
    # Mostly alike: two random calls would never have the same key.
    other = {name: second[name] if name in swap else value for name, value in first.items()}
    launched = launch_of(first), launch_of(other)
    keys = key_of(*call(first)), key_of(*call(other))
    assert None in keys or keys[0] != keys[1] or launched[0] == launched[1]
    if not swap:
        assert keys[0] == keys[1]
        assert keys[0] is not None


@pytest.mark.parametrize("name", [name for name, values in CHOICES.items() if len(values) > 1])
def test_whatever_changes_a_launch_changes_the_key(name: str) -> None:
    plain = {name: values[-1] for name, values in CHOICES.items()} | {"mask": "window"}
    changed = 0
    for value in CHOICES[name]:
        other = plain | {name: value}
        alike = launch_of(plain) == launch_of(other)
        changed += not alike
        assert alike or key_of(*call(plain)) != key_of(*call(other))
    assert changed


@given(ask=asks)
def test_a_remembered_call_is_repeated_on_its_own_tensors(ask: dict[str, Any]) -> None:
    plan.forget()
    with torch.no_grad():
        for _ in range(2):
            flash.attention(*call(ask)[0], **call(ask)[1])
        tensors, options = call(ask)
        LAUNCHES.clear()
        AGAIN.clear()
        state = flash.attention(*tensors, **options)
    if ask["mask"] in {"lengths", "prefix"}:  # bounds are tensors, whose contents may have changed
        assert len(LAUNCHES) == 1
        assert not AGAIN
        return
    assert not LAUNCHES
    per_head = [0 if options[name] is None else options[name].data_ptr() for name in ("sink", "alibi")]
    assert [(*(x.data_ptr() for x in tensors), state.out.data_ptr(), state.lse.data_ptr(), *per_head, 0, 0)] == AGAIN
    assert (state.out.dtype, state.lse.dtype) == (ask["out_dtype"] or ask["dtype"], torch.float32)
    assert list(state.out.shape) == [2, ask["h"], ask["m"], ask["e"]]


REFUSED = (ValueError, TypeError)  # the latter by whoever checks the specification's signatures
WRONG: dict[str, dict[str, Any]] = {
    "k_offset is a truth": {"k_offset": False}, "q_offset is a truth": {"q_offset": True},
    "scale is a tensor": {"scale": torch.tensor(0.5)}, "softcap": {"softcap": -1.0},
    "out_dtype is a list": {"out_dtype": [torch.float16]}, "sink": {"sink": torch.zeros(3)},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_call_that_means_nothing_fails_after_one_that_does(wrong: str) -> None:
    q, k, v = (heads(2, 5, 16, torch.float16, "plain") for _ in range(3))
    with torch.no_grad():
        for _ in range(3):
            flash.attention(q, k, v, q_offset=1)
        with pytest.raises(REFUSED, match=r"must be|Type-check"):
            flash.attention(q, k, v, **{"q_offset": 1, **WRONG[wrong]})
        with pytest.raises(REFUSED, match=r"must be|Type-check"):
            flash.attention(q, k, None)  # type: ignore[arg-type]
        with pytest.raises(REFUSED, match=r"must be|Type-check"):
            flash.attention(q, k[..., :8], v)


def test_overridden_choices_are_neither_remembered_nor_passed_over() -> None:
    q, k, v = (heads(2, 5, 16, torch.float16, "plain") for _ in range(3))
    with torch.no_grad():
        for _ in range(3):
            flash.attention(q, k, v)
        LAUNCHES.clear()
        choice = {"tile_m": 16, "tile_n": 16, "num_warps": 1, "num_stages": 1, "descriptors": False}
        with autotune.override({"flash.forward": choice}):
            for _ in range(3):
                flash.attention(q, k, v)
        assert [launch[2]["M"] for launch in LAUNCHES] == [16] * 3
        flash.attention(q, k, v)
        assert len(LAUNCHES) == 3


def test_watched_calls_are_not_remembered() -> None:
    q, k, v = (heads(2, 5, 16, torch.float16, "plain") for _ in range(3))
    plain = {
        "mask": masks.causal(), "scale": None, "softcap": None, "sink": None, "alibi": None, "q_offset": None,
        "k_offset": 0, "out_dtype": None,
    }  # fmt: skip
    assert key_of((q, k, v), plain) is not None
    assert key_of((q.clone().requires_grad_(), k, v), plain) is None
    assert key_of((q, k, v), {**plain, "sink": torch.zeros(2, requires_grad=True)}) is None
    for true in ({"q_offset": True}, {"k_offset": True}):  # equal to 1, which is an offset
        assert key_of((q, k, v), plain | true) is None
    with torch.no_grad():
        assert key_of((q.clone().requires_grad_(), k, v), plain) is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert key_of((torch.empty(2, 2, 5, 16), k, v), plain) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(key_of((x, k, v), plain)) or x)(q[None])
    assert seen == [None]


TURNS: dict[str, Any] = {
    "h": (2, 4), "m": (1, 5), "d": (16, 24), "planes": (4, 8), "dtype": (torch.float16, torch.float32),
    "q": ("plain", "tokens first"), "position": ("tokens", "batch", "axes"), "kind": (torch.int32, torch.int64),
    "factor": (1.0, 2.0, "rows"), "inv_freq": ("plain", "rows", "backwards"), "axis": (False, True),
    "pairing": ("half", "interleaved"), "both": (False, True),
}  # fmt: skip
turns = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in TURNS.items()})


def turn(ask: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensor, spec.Rotation, Any]:
    """Make the tensors of a rotation."""
    q, k = (heads(count, ask["m"], ask["d"], ask["dtype"], ask["q"]) for count in (ask["h"], 2))
    sizes = {"tokens": (), "batch": (2,), "axes": (3, 2)}[ask["position"]]
    position = torch.zeros(*sizes, ask["m"], dtype=ask["kind"])
    speed = torch.zeros(2, 2 * ask["planes"], dtype=torch.float64)
    speed = {"plain": speed[0, : ask["planes"]], "rows": speed[:, : ask["planes"]], "backwards": speed[0, ::2]}[
        ask["inv_freq"]
    ]
    factor = torch.ones(speed.shape[:-1], dtype=torch.float64) if ask["factor"] == "rows" else ask["factor"]
    axis = torch.zeros(ask["planes"], dtype=torch.int64) if ask["axis"] else None
    rotation = spec.Rotation(speed, attention_factor=factor, axis=axis)
    return ((q, k) if ask["both"] else (q,)), position, rotation, ask["pairing"]


@given(first=turns, swap=st.sets(st.sampled_from(sorted(TURNS)), max_size=2), second=turns)
def test_rotations_of_one_key_are_launched_alike(first: dict[str, Any], swap: set[str], second: dict[str, Any]) -> None:
    other = {name: second[name] if name in swap else value for name, value in first.items()}
    keys, launched = [], []
    for ask in (first, other):
        x, position, rotation, pairing = turn(ask)
        plan.forget()
        LAUNCHES.clear()
        with torch.no_grad():
            operation: Any = flash.rotate_qk if len(x) == 2 else flash.rotate
            for _ in range(3):
                AGAIN.clear()
                results = operation(*x, position, rotation, pairing=pairing)
            results = results if len(x) == 2 else (results,)
            keys.append(rope.asked(position, rotation, pairing, *x))
        launched.append(told(LAUNCHES[0]))
        assert len(LAUNCHES) == (3 if ask["inv_freq"] == "backwards" else 2)  # of that, a copy was read
        assert len(AGAIN) == 3 - len(LAUNCHES)
        if AGAIN:
            given_to = [x[0], results[0], x[-1], results[-1], position, rotation.inv_freq]
            assert AGAIN[0][:6] == tuple(one.data_ptr() for one in given_to)
            direct = [0 if one is None else one.data_ptr() for one in LAUNCHES[0][1][6:8]]
            assert AGAIN[0][6:] == tuple(direct)
    assert keys[0] != keys[1] or launched[0] == launched[1]
    assert swap or keys[0] == keys[1]
