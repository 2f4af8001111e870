"""Attention of `flash` against exact attention in float64: any tiling, any mask, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.backends.flash import launch
from longspan.backends.flash.choices import Choice
from longspan.backends.flash.lowering import lower
from longspan.backends.flash.sight import sight
from longspan.laws.budget import attention_bounds, worst
from longspan.laws.problems import Attention
from longspan.laws.strategies import HEAD_DIMS, SEEDS, attentions
from longspan.spec import masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
few = settings(max_examples=8 if DEVICE == "cpu" else 60)  # interpreted, one takes about a second

SIZES = st.sampled_from([1, 7, 16, 31, 33, 47, 64, 70])
SERVED = st.sampled_from(["float32", "bfloat16", "float16"])
TILES = st.sampled_from([16, 32, 64])
SMALL: dict[str, Any] = {
    "m": SIZES, "n": SIZES, "d": st.one_of(st.just(16), HEAD_DIMS), "dtype": SERVED, "needle": st.just(False),
    "mean": st.just(0.0), "out_dtype": st.just(None), "amplitude": st.sampled_from([1.0, 3.0]),
}  # fmt: skip


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Attention:
    """Draw a small problem that the backend serves."""
    return draw(attentions(**{name: draw(values, label=name) for name, values in SMALL.items()}, **fixed))


@contextmanager
def tiled(choice: Choice) -> Iterator[None]:
    """Launch every kernel with one choice, descriptors only where the tensors allow them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch,
            "choose",
            lambda key: choice if key.descriptors else Choice(**{**vars(choice), "descriptors": False}),
        )
        yield


def assert_exact(problem: Attention) -> None:
    """Compare outputs and gradients, through out and lse together, with their budgets."""
    of = problem.inputs(DEVICE)
    leaves = {"q": of.q, "k": of.k, "v": of.v, "sink": of.options["sink"]}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
    state = flash.attention(*(leaves[x] for x in "qkv"), **{**of.options, "sink": leaves.get("sink")})
    grads = torch.autograd.grad([state.out, state.lse], list(leaves.values()), [of.d_out, of.d_lse.to(torch.float32)])
    bound = attention_bounds(*of.arguments, **of.options, d_out=of.d_out, d_lse=of.d_lse)
    found = {"out": state.out, "lse": state.lse, **dict(zip([f"d{name}" for name in leaves], grads, strict=True))}
    assert set(found) == set(bound)
    for name, x in found.items():
        assert worst(name, x, bound[name]) <= 1


@few
@given(problems(), TILES, TILES, st.booleans())
def test_every_tiling_is_exact_forward_and_backward(
    problem: Attention, tall: int, wide: int, descriptors: bool
) -> None:
    with tiled(Choice(tile_m=tall, tile_n=wide, num_warps=4, num_stages=1, descriptors=descriptors)):
        assert_exact(problem)


@few
@given(problems(mask="causal() & window(9)", sink=1.0, softcap=5.0, alibi=0.5), TILES)
def test_a_window_with_every_option_is_exact(problem: Attention, tall: int) -> None:
    with tiled(Choice(tile_m=tall, tile_n=16, num_warps=4, num_stages=1)):
        assert_exact(problem)


@few
@given(SEEDS, SIZES, SIZES, st.integers(0, 20), st.booleans())
def test_spans_may_jump_back_and_forth(seed: int, m: int, n: int, keep: int, each: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = (2, m) if each else (m,)
    first, last, base = (torch.randint(0, n + 1, shape, generator=draw).tolist() for _ in range(3))
    mask = f"spans(tensor({first}), tensor({last}), tensor({base}), {keep})"
    with tiled(Choice(tile_m=16, tile_n=16, num_warps=4, num_stages=1)):
        assert_exact(Attention(b=2, m=m, n=n, mask=mask, dead=float("nan"), seed=seed))


@given(st.data(), SEEDS, st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 16]))
def test_no_row_that_sees_a_tile_of_keys_is_missed(data: st.DataObject, seed: int, m: int, n: int, size: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    keep = data.draw(st.integers(0, n), label="keep")
    first, last, base = torch.randint(0, n + 1, (3, 2, m), generator=draw)
    if data.draw(st.booleans(), label="monotone"):
        first, last, base = (x.sort(-1).values for x in (first, last, base))
    seen = lower(masks.spans(first, last, base, keep), 2, m, n, q_offset=None, k_offset=0, device=first.device)
    assert seen.rows is not None
    rows = seen.rows.long()
    shown = spec.visible(spec.Bounds(rows[0], rows[1], rows[2], keep, rows[3]), n)
    for b, tiles in enumerate(sight(seen.rows, keep, n, size).tolist()):
        for tile, (low, high, full_low, full_high, head_low, head_high) in enumerate(tiles):
            keys = shown[b, :, tile * size : (tile + 1) * size]
            found = {*range(low, high), *range(head_low, head_high)}
            assert set(keys.any(-1).nonzero().flatten().tolist()) <= found
            if (tile + 1) * size <= n:
                assert bool(keys[full_low:full_high].all())


def test_strides_beyond_what_a_tile_can_index_in_32_bits_are_followed() -> None:
    # Untouched pages of these 400 MB are never given memory.
    stride = 2**26
    room = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE)
    far = room.as_strided((1, 1, 3, 16), (3 * stride, 3 * stride, stride, 1))
    near = torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    far.copy_(near)
    choice = Choice(tile_m=32, tile_n=32, num_warps=4, num_stages=1)
    assert launch.flags(call(), choice, far, far, far)["FAR"]
    assert not launch.flags(call(), choice, near, near, near)["FAR"]
    with tiled(choice):
        found, expected = flash.attention(far, far, far), flash.attention(near, near, near)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)


def call() -> launch.Call:
    """A call of attention over everything."""
    return launch.Call(None, None, None, None, (-3, 3, 3, 0, 0), 1.0, None, torch.float16)


def arguments(seed: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k and v of a small problem."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(2, h, m, 16, generator=draw).to(DEVICE).requires_grad_(**options)
        for h, m in ((4, 9), (2, 11), (2, 11))
    )  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("b", "m", "n"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_a_problem_without_tokens_has_gradients(b: int, m: int, n: int) -> None:
    q, k, v = (torch.zeros(b, 2, tokens, 16, device=DEVICE, requires_grad=True) for tokens in (m, n, n))
    sink = torch.ones(2, device=DEVICE, requires_grad=True)
    state = flash.attention(q, k, v, sink=sink)
    assert state.out.shape == (b, 2, m, 16)
    assert torch.equal(state.out, torch.zeros_like(state.out))
    assert torch.equal(state.lse, torch.ones_like(state.lse))
    *grads, d_sink = torch.autograd.grad(state.out.sum() + state.lse.sum(), (q, k, v, sink))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert torch.equal(d_sink, torch.full_like(sink, b * m))


def test_what_is_not_served_is_declined_by_name() -> None:
    q, k, v = (x.detach() for x in arguments())
    slopes = torch.ones(4, device=DEVICE, requires_grad=True)
    refused: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((q.double(), k.double(), v.double()), {}),
        ((q[..., :12], k[..., :12], v), {}),
        ((q[..., ::2], k[..., ::2], v), {}),
        ((q, k, v), {"alibi": slopes}),
        ((q, k, v), {"out_dtype": torch.float64}),
    ]
    for wrong, options in refused:
        reason = flash.declines("attention", *wrong, **options)
        assert reason is not None
        with pytest.raises(Unsupported, match=r"flash\.attention"):
            flash.attention(*wrong, **options)
    assert flash.declines("attention", q, k, v, mask=masks.causal(), softcap=1.0, alibi=slopes.detach()) is None
