"""Attention agrees with PyTorch's, with its own fold over tiles, and with finite differences."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.laws import Attention, Bound, attention_bounds, worst
from longspan.laws.strategies import attentions
from longspan.spec import AttentionState, attention, attention_tiled, bounds, masks, visible
from longspan.spec.tiled import classify

TILES = st.sampled_from([1, 2, 3, 7, 16, 32, 64, 1000])


@given(st.data(), TILES, TILES)
def test_any_tiling_gives_the_same_result(data: st.DataObject, tile_m: int, tile_n: int) -> None:
    """FlashAttention's theorem: the fold over tiles, empty ones skipped and full ones unmasked, is attention."""
    # At most 20 tiles each way: the fold is a loop in Python.
    m, n = (data.draw(st.integers(0, min(20 * tile, 140))) for tile in (tile_m, tile_n))
    problem = data.draw(attentions(dtype="float64", b=1, m=m, n=n), label="problem")
    of = problem.inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    state = attention_tiled(*of.arguments, **of.options, tile_m=tile_m, tile_n=tile_n)
    assert max(worst("out", state.out, bound["out"]), worst("lse", state.lse, bound["lse"])) <= 1


@given(attentions(), st.integers(0, 140), st.integers(1, 70))
def test_a_tile_is_empty_full_or_cut_exactly(problem: Attention, start: int, size: int) -> None:
    """Comparing integers decides what looking at every pair would."""
    offset = torch.tensor(problem.q_offset) if isinstance(problem.q_offset, tuple) else problem.q_offset
    sizes = problem.b, problem.m, problem.n
    seen = bounds(problem.build_mask(), *sizes, q_offset=offset, k_offset=problem.k_offset)
    keys = slice(min(start, problem.n), min(start + size, problem.n))
    pairs = visible(seen, problem.n)[:, :, keys]
    if pairs.numel():
        truth = "empty" if not pairs.any() else "full" if pairs.all() else "cut"
        assert classify(seen, keys) == truth


@given(attentions(dtype="float64", mask="causal()", softcap=None, sink=None, alibi=None, q_offset=None, k_offset=0))
def test_causal_attention_is_pytorchs(problem: Attention) -> None:
    """`scaled_dot_product_attention` with the bottom-right mask written out."""
    of = problem.inputs()
    mask = torch.ones(problem.m, problem.n, dtype=torch.bool).tril(problem.n - problem.m)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *of.arguments, attn_mask=mask, scale=problem.scale, enable_gqa=True
    )
    sees = mask.any(-1)  # PyTorch's rows without keys are its own affair
    torch.testing.assert_close(attention(*of.arguments, **of.options).out[:, :, sees], theirs[:, :, sees])


@pytest.mark.parametrize(
    "mask", [masks.everything(), masks.causal() & masks.window(2, keep_first=1), masks.lengths([0])]
)
def test_gradients_are_finite_differences(mask: Any) -> None:
    of = Attention(h=2, g=1, m=3, n=4, d=3, e=2, dtype="float64", sink=1.0, alibi=0.5, softcap=2.0).inputs()
    sink, slopes = of.options["sink"], of.options["alibi"]

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, sink, slopes = tensors
        return tuple(attention(q, k, v, mask=mask, softcap=2.0, sink=sink, alibi=slopes))

    leaves = [x.detach().requires_grad_() for x in (*of.arguments, sink, slopes)]
    assert torch.autograd.gradcheck(call, leaves)


@given(attentions(needle=False, sink=None))
def test_weights_sum_to_one(problem: Attention) -> None:
    """Values that are all one come out as one, wherever some key is seen, and as zero elsewhere."""
    of = problem.inputs()
    ones = torch.ones_like(of.v)
    state = attention(of.q, of.k, ones, **of.options)
    budget = attention_bounds(of.q, of.k, ones, **of.options)["out"].budget
    sees = (state.lse != -torch.inf).double()[..., None].expand_as(state.out)
    assert worst("the sum of weights", state.out, Bound(sees, budget)) <= 1


def test_a_sink_far_above_every_score_takes_all() -> None:
    """Scores under a peak of their own would overflow: exp(1e4) is infinite."""
    of = Attention(m=3, n=5).inputs()
    state = attention(*of.arguments, sink=torch.tensor([1e4]))
    assert torch.equal(state.out, torch.zeros_like(state.out))
    assert torch.equal(state.lse, torch.full_like(state.lse, 1e4))


def test_no_key_at_all_is_a_row_without_keys() -> None:
    q, nothing = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8)
    state = attention(q, nothing, nothing)
    assert isinstance(state, AttentionState)
    assert torch.equal(state.out, torch.zeros(2, 4, 3, 8))
    assert torch.equal(state.lse, torch.full((2, 4, 3), -torch.inf))


def test_alibi_measures_distance_in_documents() -> None:
    """Packed documents are as far from themselves as they would be alone."""
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    slopes = torch.tensor([0.5, 0.25])
    packed = attention(q, k, k, mask=masks.documents([2, 4], [5, 4]), alibi=slopes)
    alone = attention(q[:, :, 2:], k[:, :, 5:], k[:, :, 5:], alibi=slopes)
    torch.testing.assert_close(packed.out[:, :, 2:], alone.out)
