# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""`flash.merge` and `flash.add_sink` against the specification: any number of parts, empty rows, every derivative."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.spec import AttentionState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
FINE = 8 * torch.finfo(torch.float32).eps


def parts(
    seed: int, count: int, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, spread: float = 10.0
) -> list[AttentionState]:
    """Draw states, a tenth of whose rows saw no key, alternately with heads outside and inside tokens."""
    draw, states = torch.Generator().manual_seed(seed), []
    for part in range(count):
        lse = spread * torch.randn(shape[:3], generator=draw)
        empty = torch.rand(shape[:3], generator=draw) < 0.1
        out = torch.randn(shape, generator=draw).masked_fill(empty[..., None], 0.0).to(dtype)
        out = out.transpose(1, 2).contiguous().transpose(1, 2) if part % 2 else out
        states.append(AttentionState(out.to(DEVICE), lse.masked_fill(empty, -torch.inf).to(DEVICE)))
    return states


def wide(states: list[AttentionState]) -> list[AttentionState]:
    """Copy states to float64, as leaves."""
    return [AttentionState(*(x.detach().double().requires_grad_(x.requires_grad) for x in state)) for state in states]


def assert_merged(
    found: AttentionState, states: list[AttentionState], truth: AttentionState, sink: float = 0.0
) -> None:
    """Compare with the truth: a weight is off by the rounding of its exponent."""
    size = torch.stack([state.lse for state in states]).double().nan_to_num(neginf=0.0).abs().amax(0) + abs(sink)
    largest = torch.stack([state.out for state in states]).double().abs().amax(0)
    off = FINE * (size + 1)
    eps = torch.finfo(found.out.dtype).eps
    budget = 2 * (eps * truth.out.abs() + off[..., None] * largest) + torch.finfo(found.out.dtype).tiny
    assert not (found.out.double() - truth.out).abs().gt(budget).any()
    assert not found.out.isnan().any()
    equal = found.lse.double() == truth.lse  # -inf equals -inf
    assert (equal | ((found.lse.double() - truth.lse).abs() <= off * 2)).all()
    assert found.lse.dtype == torch.float32


shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 4), st.sampled_from([0, 1, 5, 17]), st.sampled_from([1, 8, 24, 80])
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=25)
@given(
    st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 3, 7, 16, 17, 40]), shapes, dtypes, st.sampled_from([1.0, 50.0])
)
def test_any_number_of_parts_make_the_whole(
    seed: int, count: int, shape: tuple, dtype: torch.dtype, spread: float
) -> None:
    states = parts(seed, count, shape, dtype, spread)
    found = flash.merge(*states)
    assert found.out.dtype == dtype
    if found.out.numel():
        assert_merged(found, states, spec.merge(*wide(states)))


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), shapes, dtypes, st.sampled_from([0.0, 1.0, 1000.0]))
def test_a_sink_takes_its_share_and_never_overflows(
    seed: int, shape: tuple, dtype: torch.dtype, magnitude: float
) -> None:
    (state,) = parts(seed, 1, shape, dtype)
    sink = magnitude * torch.randn(shape[1], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    found = flash.add_sink(state, sink)
    if found.out.numel():
        truth = spec.add_sink(*wide([state]), sink.double())
        assert_merged(found, [state], truth, float(sink.abs().max()))
        empty = state.lse == -torch.inf
        assert found.out[empty].count_nonzero() == 0
        assert torch.equal(found.lse[empty], sink[None, :, None].expand_as(empty)[empty])


def test_rows_without_keys_stay_empty_with_gradient_zero() -> None:
    states = [
        AttentionState(
            torch.zeros(1, 2, 3, 8, device=DEVICE, requires_grad=True),
            torch.full((1, 2, 3), -torch.inf, device=DEVICE, requires_grad=True),
        )
        for _ in range(3)
    ]
    merged = flash.merge(*states)
    assert merged.out.count_nonzero() == 0
    assert (merged.lse == -torch.inf).all()
    leaves = [x for state in states for x in state]
    for found in torch.autograd.grad(merged, leaves, [torch.randn_like(x) for x in merged]):
        assert found.count_nonzero() == 0


def gradients(backend: Any, states: list[AttentionState], sink: Tensor, order: int = 1) -> tuple[Tensor, ...]:
    """Differentiate a function of the merged state, once or twice, by every part and the sink."""
    leaves = [*(x for state in states for x in state), sink]
    whole = backend.add_sink(backend.merge(*states), sink)
    slope = torch.linspace(-1, 1, whole.out.numel(), device=DEVICE).reshape(whole.out.shape)
    loss = (whole.out * slope.to(whole.out.dtype)).sum() + (whole.lse**2).sum()
    found = torch.autograd.grad(loss, leaves, create_graph=order == 2)
    return found if order == 1 else torch.autograd.grad(sum((x**2).sum() for x in found), leaves)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_derivatives_reach_every_part_and_the_sink(count: int, order: int) -> None:
    states = parts(0, count, (2, 3, 5, 12), spread=2.0)
    for x in (x for state in states for x in state):
        x.requires_grad_()
    sink = torch.randn(3, device=DEVICE, requires_grad=True)
    truth = gradients(spec, wide(states), sink.detach().double().requires_grad_(), order)
    for found, exact in zip(gradients(flash, states, sink, order), truth, strict=True):
        assert (found.double() - exact).abs().max() < 2e-5 * (1 + exact.abs().max())


def test_the_first_part_decides_the_dtype() -> None:
    low, high = parts(0, 2, (1, 2, 3, 8), torch.bfloat16), parts(1, 2, (1, 2, 3, 8))
    assert flash.merge(high[0], low[0]).out.dtype == torch.float32
    mixed = [low[0], high[0]]
    found = flash.merge(*mixed)
    assert found.out.dtype == torch.bfloat16
    assert_merged(found, mixed, spec.merge(*wide(mixed)))


def test_many_parts_of_low_precision_are_rounded_once() -> None:
    states = parts(0, 40, (1, 2, 5, 8), torch.bfloat16, spread=0.1)
    truth = spec.merge(*wide(states))
    found = flash.merge(*states)
    # One truncation of the result, float32 elsewhere: a second rounding in between would show as half as much again.
    assert (found.out.double() - truth.out).abs().max() <= torch.finfo(torch.bfloat16).eps * truth.out.abs().max()
    assert_merged(found, states, truth)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, 0, None), (None, 0, None), (None, None, 0), (1, 2, 1)], ids=str)
def test_mapping_is_a_loop(mapped: tuple) -> None:
    first, second = parts(0, 2, (2, 3, 4, 8))
    draw = torch.Generator().manual_seed(0)
    of = (first.out, first.lse, torch.zeros(3, device=DEVICE))
    of = tuple(
        x if dim is None else (torch.randn([4, *x.shape], generator=draw).to(DEVICE).movedim(0, dim))
        for x, dim in zip(of, mapped, strict=True)
    )

    def whole(backend: Any, out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(backend.add_sink(backend.merge(AttentionState(out, lse), second), sink))

    found = torch.vmap(lambda *of: whole(flash, *of), mapped)(*of)
    for i in range(4):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(of, mapped, strict=True)]
        for x, exact in zip(found, whole(spec, *one), strict=True):
            assert (x[i] - exact).abs().max() < 1e-5


def test_transforms_and_compilation_agree_with_the_eager_call() -> None:
    first, second = parts(0, 2, (2, 3, 4, 8), spread=1.0)
    first.lse[0, 0, 0] = second.lse[0, 0, 0] = -torch.inf

    def loss(backend: Any, out: Tensor, lse: Tensor) -> Tensor:
        merged = backend.add_sink(backend.merge(AttentionState(out, lse), second), torch.ones(3, device=DEVICE))
        return (merged.out**2).sum() + merged.lse.sum()

    truth = torch.func.grad(lambda *of: loss(spec, *of), argnums=(0, 1))(*first)
    eager = torch.func.grad(lambda *of: loss(flash, *of), argnums=(0, 1))
    for run in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        for found, exact in zip(run(*first), truth, strict=True):
            assert (found - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out": torch.zeros(1, 2, 3, 8, device=DEVICE).double()}, "float64"),
        ({"lse": torch.zeros(1, 2, 3, device=DEVICE).double()}, "float32 lse"),
        ({"out": torch.zeros(1, 2, 8, 3, device=DEVICE).transpose(2, 3)}, "last stride"),
    ],
    ids=["float64", "a float64 lse", "strided values"],
)
def test_what_is_not_served_is_said(changes: dict, reason: str) -> None:
    state = parts(0, 1, (1, 2, 3, 8))[0]._replace(**changes)
    assert reason in str(flash.declines("merge", state, state))
    with pytest.raises(Unsupported, match=reason):
        flash.merge(state, state)
    with pytest.raises(Unsupported, match=reason):
        flash.add_sink(state, torch.zeros(2, device=DEVICE))


def test_what_means_nothing_is_an_error() -> None:
    state, other = parts(0, 1, (1, 2, 3, 8))[0], parts(0, 1, (1, 2, 4, 8))[0]
    with pytest.raises(ValueError, match="at least one state"):
        flash.merge()
    with pytest.raises(ValueError, match="of one shape"):
        flash.merge(state, other)
    with pytest.raises(ValueError, match="one floating number per head"):
        flash.add_sink(state, torch.zeros(3, device=DEVICE))
