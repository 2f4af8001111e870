"""The budget itself: it accepts correct arithmetic wherever that is hard, and rejects small bugs in long problems."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange

from longspan.laws import Attention, attention_bounds, worst
from longspan.laws.attention import backward
from longspan.spec import AttentionState, attention, masks, merge

DTYPES = ["float32", "float16", "bfloat16"]


def flash(of: Any, tile: int = 64) -> AttentionState:
    """FlashAttention as kernels compute it: products of rounded operands in float32, weights rounded before P·V."""
    options, dtype = of.options, of.q.dtype
    q, k, v = (x.float() for x in of.arguments)
    scale = 1 / math.sqrt(q.shape[-1]) if options["scale"] is None else options["scale"]
    hidden = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    if options["mask"].terms:
        window = options["mask"].terms[0].size
        i, j = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
        hidden = (j > i) | (j <= i - window)
    peak = torch.full((*q.shape[:3], 1), -torch.inf)
    total, acc = torch.zeros_like(peak), torch.zeros(*q.shape[:3], v.shape[-1])
    for start in range(0, k.shape[2], tile):
        keys = slice(start, start + tile)
        score = (scale * (q @ k[:, :, keys].mT)).masked_fill(hidden[:, keys], -torch.inf)
        new = torch.maximum(peak, score.amax(-1, keepdim=True))
        finite = new.masked_fill(new == -torch.inf, 0.0)
        weight, keep = (score - finite).exp(), (peak - finite).exp()
        total, peak = keep * total + weight.sum(-1, keepdim=True), new
        acc = keep * acc + weight.to(dtype).float() @ v[:, :, keys]
    return AttentionState((acc / total).to(dtype), rearrange(peak + total.log(), "b h m 1 -> b h m"))


def flash_backward(of: Any, state: AttentionState) -> dict[str, torch.Tensor]:
    """Backward of FlashAttention-2 with P and dS rounded before their products, without a mask."""
    dtype, scale = of.q.dtype, 1 / math.sqrt(of.q.shape[-1])
    q, k, v, d_out = (x.float() for x in (*of.arguments, of.d_out))
    p = (scale * (q @ k.mT) - state.lse[..., None]).exp()
    delta = (state.out.float() * d_out).sum(-1, keepdim=True)
    d_score = (p * (d_out @ v.mT - delta)).to(dtype).float()
    dq, dk, dv = scale * (d_score @ k), scale * (d_score.mT @ q), p.to(dtype).float().mT @ d_out
    return {"dq": dq.to(dtype), "dk": dk.to(dtype), "dv": dv.to(dtype)}


HARD = {
    "one key": {"m": 1, "n": 1},
    "window of one": {"m": 130, "n": 130, "mask": "window(1)"},
    "values of mean 100": {"m": 100, "n": 300, "mean": 100.0},
    "logits of rms 100": {"m": 100, "n": 300, "amplitude": 10.0, "scale": 1 / 4},
    "no logits at all": {"m": 64, "n": 1000, "amplitude": 0.0},
    "a needle": {"m": 64, "n": 1000, "needle": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("seed", range(5))
def test_correct_flash_arithmetic_is_accepted(case: str, dtype: str, seed: int) -> None:
    of = Attention(**{"h": 2, "g": 2, "dtype": dtype, "seed": seed, **HARD[case]}).inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    state = flash(of)
    assert 0 <= max(worst("out", state.out, bound["out"]), worst("lse", state.lse, bound["lse"])) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one key", "values of mean 100", "no logits at all"])
@pytest.mark.parametrize("seed", range(5))
def test_correct_flash_gradients_are_accepted(case: str, dtype: str, seed: int) -> None:
    of = Attention(**{"h": 2, "g": 2, "dtype": dtype, "seed": seed, **HARD[case]}).inputs()
    bound = attention_bounds(*of.arguments, **of.options, d_out=of.d_out)
    for name, gradient in flash_backward(of, flash(of)).items():
        assert worst(name, gradient, bound[name]) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_an_out_too_small_to_be_held_is_accepted(seed: int) -> None:
    """A sink of 15 leaves float16 an out of a few subnormal steps: delta inherits their rounding."""
    of = Attention(h=2, g=2, m=1, n=1, d=64, e=64, dtype="float16", seed=seed).inputs()
    sink = torch.full((2,), 15.0)
    bound = attention_bounds(*of.arguments, **{**of.options, "sink": sink}, d_out=of.d_out)
    delta = (bound["out"].truth.half().double() * of.d_out.double()).sum(-1)
    share = (sink[:, None] - bound["lse"].truth).exp()
    assert worst("dsink", -(share * delta).sum((0, 2)), bound["dsink"]) <= 1


def test_weights_rounded_coarser_than_the_inputs_are_rejected() -> None:
    of = Attention(m=64, n=256, dtype="float32").inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    coarse = attention(*(x.bfloat16() for x in of.arguments), out_dtype=torch.float32)
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst("out", coarse.out, bound["out"])


LONG = 131_072


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dropped_tile_at_128k_is_rejected(dtype: str) -> None:
    of = Attention(m=8, n=LONG, d=32, e=64, dtype=dtype).inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    parts = [
        attention(of.q, of.k[:, :, keys], of.v[:, :, keys], out_dtype=torch.float32)
        for keys in (slice(0, 64_000), slice(64_064, None))
    ]
    dropped = merge(*parts)
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst("out", dropped.out.to(of.q.dtype), bound["out"])
    whole = attention(*of.arguments)
    assert worst("out", whole.out, bound["out"]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_is_rejected(dtype: str, off: int) -> None:
    """The needle lies where only a wrong window sees it, or only a right one does."""
    of = Attention(m=600, n=600, dtype=dtype, needle=True, mask="window(512)", seed=2).inputs()
    assert of.v.abs().amax(-1).argmax() < 600 - 512
    bound = attention_bounds(*of.arguments, **of.options)
    wrong = attention(*of.arguments, mask=masks.window(512 + off))
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst("out", wrong.out, bound["out"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "keys"), [("out", 8), ("lse", 1000)])
def test_a_sink_of_zero_left_out_is_rejected(name: str, keys: int, dtype: str) -> None:
    """Among many keys a sink's share of out drowns in bfloat16's rounding; the log-sum-exp still tells."""
    of = Attention(m=16, n=keys, dtype=dtype, sink=0.0).inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst(name, getattr(attention(*of.arguments), name), bound[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_lse_in_base_2_is_rejected(dtype: str) -> None:
    of = Attention(m=16, n=200, dtype=dtype).inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst("lse", attention(*of.arguments).lse / math.log(2), bound["lse"])


def test_nan_is_rejected_and_infinity_equals_itself() -> None:
    of = Attention(m=3, n=5, mask="lengths([0])").inputs()
    bound = attention_bounds(*of.arguments, **of.options)
    state = attention(*of.arguments, mask=masks.lengths([0]))
    assert worst("lse", state.lse, bound["lse"]) == 0
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst("out", state.out + math.nan, bound["out"])
    with pytest.raises(AssertionError, match="exceeds budget"):
        worst("lse", -state.lse, bound["lse"])


def test_the_budget_reads_inputs_alone() -> None:
    """The same inputs have the same budget, finite in every element, and positive where rounding is possible."""
    of = Attention(h=4, g=2, m=40, n=50, dtype="bfloat16", sink=1.0, softcap=30.0, mask="causal()", seed=1).inputs()
    first, second = (attention_bounds(*of.arguments, **of.options, d_out=of.d_out, d_lse=of.d_lse) for _ in range(2))
    assert set(first) == {"out", "lse", "dq", "dk", "dv", "dsink"}
    for name, bound in first.items():
        assert torch.equal(bound.budget, second[name].budget)
        assert bool((bound.budget > 0).all())
        assert bool(bound.budget.isfinite().all())


def test_an_infinite_budget_is_a_bug_of_the_test() -> None:
    of = Attention(m=3, n=5).inputs()
    bound = attention_bounds(*of.arguments, **of.options)["out"]
    with pytest.raises(ArithmeticError, match="the test is wrong"):
        worst("out", bound.truth, bound._replace(budget=bound.budget / 0))


def test_truth_gradients_are_those_of_autograd() -> None:
    """The budget's explicit gradient is the derivative of the definition."""
    from longspan.backends import eager  # noqa: PLC0415 - only this test needs a backend

    of = Attention(
        b=2, h=4, g=2, m=20, n=30, dtype="float64", sink=1.0, softcap=5.0, alibi=0.5, mask="window(9)", seed=2
    ).inputs()
    bound = attention_bounds(*of.arguments, **of.options, d_out=of.d_out, d_lse=of.d_lse)
    for name, gradient in backward(eager, of, through_lse=True).items():
        torch.testing.assert_close(gradient, bound[f"d{name}"].truth, rtol=1e-11, atol=1e-13)
