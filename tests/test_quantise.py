"""Quantised heads: what a scale is, what rounding costs, and attention to what numbers stand for.

Shapes: 1 to 3 sequences and heads, up to 40 tokens, head dimensions 1 to 64.
"""

from collections.abc import Callable
from typing import Any, Final

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.spec import Quantised, masks, quantise
from longspan.spec.quantise import E4M3, LARGEST, LEAST

BLOCKS: Final = (None, 1, 3, 16, 1000)
SEEDS = st.integers(0, 10_000)


def heads(seed: int, n: int = 20, d: int = 8, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    """Draw heads whose tokens differ in size by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (spread * torch.randn(2, 3, n, 1, generator=generator))
    return (torch.randn(2, 3, n, d, generator=generator) * size).to(dtype)


def scales_are_largest_over_448(make: Callable[..., Quantised], seed: int, block: int | None, n: int) -> None:
    """Every block's scale is its own largest magnitude over 448, and the largest number is 448."""
    x = heads(seed, n)
    made = make(x, block=block)
    size = n if block is None else block
    for t in range(made.scale.shape[2]):
        part = slice(t * size, (t + 1) * size)
        largest = x[:, :, part].abs().amax((2, 3))
        assert torch.equal(made.scale[:, :, t], largest / LARGEST), "a scale is not its block's"
        assert bool((made.values[:, :, part].float().abs().amax((2, 3)) == LARGEST).all()), "448 is not reached"


def rounding_is_half_a_step(make: Callable[..., Quantised], seed: int, block: int | None, n: int) -> None:
    """What numbers stand for is off by half a step of e4m3: 2^-4 of itself, or 2^-10 of the scale where it is small."""
    x = heads(seed, n)
    made = make(x, block=block)
    step = made.scale.repeat_interleave(max(n if block is None else block, 1), 2)[:, :, :n, None].double() * 2**-10
    allowed = torch.maximum(x.double().abs() * 2**-4, step) * (1 + 1e-6)
    assert bool(((spec.dequantise(made) - x).abs() <= allowed).all()), "off by more than half a step"


def zeros_and_what_is_not_finite(make: Callable[..., Quantised], seed: int, block: int | None, n: int) -> None:
    """A head of zeros stays zeros; NaN stays NaN, infinity becomes NaN, and neither touches its neighbours."""
    x = heads(seed, n)
    clean, dirty = x.clone(), x.clone()
    clean[0, 0], dirty[0, 0] = 0.0, 0.0
    clean[1, 1, -1, :2], dirty[1, 1, -1, 0], dirty[1, 1, -1, 1] = 0.0, torch.nan, -torch.inf
    made, expected = make(dirty, block=block), quantise(clean, block=block)
    assert torch.equal(made.scale, expected.scale), "what is not finite counts"
    assert bool((made.scale[0, 0] == LEAST).all()), "zeros have another scale"
    assert bool((spec.dequantise(made)[0, 0] == 0).all()), "zeros changed"
    assert bool(made.values[1, 1, -1, :2].isnan().all()), "NaN was lost"
    rest = made.values.float()
    rest[1, 1, -1, :2] = 0.0
    assert torch.equal(rest, expected.values.float()), "NaN touched its neighbours"


LAWS: Final = (scales_are_largest_over_448, rounding_is_half_a_step, zeros_and_what_is_not_finite)


@pytest.mark.parametrize("law", LAWS)
@given(seed=SEEDS, block=st.sampled_from(BLOCKS), n=st.integers(1, 40))
def test_quantisation_obeys(law: Callable[..., None], seed: int, block: int | None, n: int) -> None:
    law(quantise, seed, block, n)


def made(values: Tensor, scale: Tensor, block: int | None) -> Quantised:
    """Quantise by given scales, to the nearest."""
    size = max(values.shape[2], 1) if block is None else block
    by = scale.repeat_interleave(size, 2)[:, :, : values.shape[2], None]
    return Quantised((values / by).to(E4M3), scale, block)


def one_scale_for_all_heads(x: Tensor, *, block: int | None = None) -> Quantised:
    """Share the largest scale among heads and sequences."""
    scale = quantise(x, block=block).scale
    return made(x, scale.amax((0, 1), keepdim=True).expand_as(scale).contiguous(), block)


def blocks_one_token_late(x: Tensor, *, block: int | None = None) -> Quantised:
    """Find scales of blocks that begin a token later."""
    return made(x, quantise(x.roll(-1, 2), block=block).scale, block)


def largest_of_blocks_before(x: Tensor, *, block: int | None = None) -> Quantised:
    """Let scales never fall from block to block, as a running maximum does."""
    return made(x, quantise(x, block=block).scale.cummax(2).values, block)


def range_of_e4m3fnuz(x: Tensor, *, block: int | None = None) -> Quantised:
    """Scale to 240, the largest of the e4m3 that AMD's gfx942 has."""
    return made(x, quantise(x, block=block).scale * (448 / 240), block)


def sign_forgotten_in_the_largest(x: Tensor, *, block: int | None = None) -> Quantised:
    """Look for the largest number, and not the largest magnitude."""
    return made(x, quantise(x.clamp(min=0), block=block).scale, block)


def truncated(x: Tensor, *, block: int | None = None) -> Quantised:
    """Round towards zero."""
    given = quantise(x, block=block)
    value, true = spec.dequantise(given), x.double()
    bits = given.values.view(torch.uint8)
    return given._replace(values=torch.where(value.abs() > true.abs(), bits - 1, bits).view(E4M3))


def two_bits_of_mantissa(x: Tensor, *, block: int | None = None) -> Quantised:
    """Round as e5m2 does."""
    given = quantise(x, block=block)
    return given._replace(values=given.values.float().to(torch.float8_e5m2).float().to(E4M3))


def nothing_below_the_least_normal(x: Tensor, *, block: int | None = None) -> Quantised:
    """Flush what is below 2^-6 · scale."""
    given = quantise(x, block=block)
    small = given.values.float().abs() < 2**-6
    return given._replace(values=given.values.float().masked_fill(small, 0.0).to(E4M3))


def nan_in_the_scale(x: Tensor, *, block: int | None = None) -> Quantised:
    """Let NaN be the largest of its block."""
    return made(x, quantise(x, block=block).scale + 0 * x.amax((2, 3))[..., None].nan_to_num(posinf=torch.nan), block)


def nan_made_zero(x: Tensor, *, block: int | None = None) -> Quantised:
    """Hide NaN."""
    return quantise(x.nan_to_num(0.0, 0.0, 0.0), block=block)


def infinity_made_448(x: Tensor, *, block: int | None = None) -> Quantised:
    """Saturate what is infinite."""
    given = quantise(x, block=block)
    bits = torch.where(x.isinf(), torch.tensor(448.0).to(E4M3).view(torch.uint8), given.values.view(torch.uint8))
    return given._replace(values=bits.view(E4M3))


def zeros_divided_by_zero(x: Tensor, *, block: int | None = None) -> Quantised:
    """Let the scale of zeros be 0."""
    scale = quantise(x, block=block).scale
    return made(x, scale.masked_fill(scale == LEAST, 0.0), block)


MUTANTS: Final = (
    one_scale_for_all_heads, blocks_one_token_late, largest_of_blocks_before, range_of_e4m3fnuz,
    sign_forgotten_in_the_largest, truncated, two_bits_of_mantissa, nothing_below_the_least_normal,
    nan_in_the_scale, nan_made_zero, infinity_made_448, zeros_divided_by_zero,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_breaks_a_law(mutant: Callable[..., Quantised]) -> None:
    broken = set()
    for law in LAWS:
        for seed, block in enumerate(BLOCKS * 2):
            try:
                law(mutant, seed, block, 37)
            except AssertionError:
                broken.add(law.__name__)
    assert broken


@given(seed=SEEDS, block=st.sampled_from(BLOCKS), n=st.integers(0, 40))
def test_what_is_quantised_stays(seed: int, block: int | None, n: int) -> None:
    once = quantise(heads(seed, n), block=block)
    twice = quantise(spec.dequantise(once), block=block)
    assert torch.equal(once.values.float(), twice.values.float())
    torch.testing.assert_close(once.scale, twice.scale, rtol=1e-6, atol=0)


@given(seed=SEEDS, block=st.integers(1, 50))
def test_a_block_never_has_a_larger_scale_than_its_head(seed: int, block: int) -> None:
    x = heads(seed, 40)
    assert bool((quantise(x, block=block).scale <= quantise(x).scale).all())


@given(seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float16, torch.bfloat16]))
def test_the_dtype_of_heads_does_not_matter(seed: int, dtype: torch.dtype) -> None:
    x = heads(seed, dtype=dtype, spread=0.0)
    one, other = quantise(x), quantise(x.float())
    assert torch.equal(one.values.float(), other.values.float())
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-6, atol=0)


@given(seed=SEEDS, block=st.sampled_from(BLOCKS), causal=st.booleans())
def test_scales_of_keys_are_part_of_the_softmax_scale(seed: int, block: int | None, causal: bool) -> None:
    options: dict[str, Any] = {"mask": masks.causal() if causal else masks.everything(), "out_dtype": torch.float64}
    q, k, v = (quantise(heads(seed + i, spread=0.3), block=block) for i in range(3))
    state = spec.attention_quantised(q, k, v, **options)
    larger = k._replace(scale=k.scale * 8)
    again = spec.attention_quantised(q, larger, v, scale=8**-0.5 / 8, **options)
    torch.testing.assert_close(again, state, rtol=1e-12, atol=1e-12)
    doubled = spec.attention_quantised(q, k, v._replace(scale=v.scale * 2), **options)
    torch.testing.assert_close(doubled.out, 2 * state.out, rtol=1e-12, atol=1e-12)
    truth = spec.attention(*map(spec.dequantise, (q, k, v)), **options)
    assert torch.equal(truth.out, state.out)
    assert torch.equal(truth.lse, state.lse)


def test_out_and_lse_have_the_dtypes_that_are_asked_for() -> None:
    q, k, v = (quantise(heads(i)) for i in range(3))
    state = spec.attention_quantised(q, k, v)
    assert (state.out.dtype, state.lse.dtype) == (torch.bfloat16, torch.float32)
    assert spec.attention_quantised(q, k, v, out_dtype=torch.float64).lse.dtype == torch.float64
    assert spec.dequantise(q).dtype == torch.float64
    assert spec.dequantise(q, torch.float32).dtype == torch.float32


X: Final = heads(0)
MADE: Final = quantise(X)
MEANINGLESS: Final[dict[str, tuple[Callable[[], Any], str]]] = {
    "integers": (lambda: quantise(X.int()), "floating tensor"),
    "no head dimension": (lambda: quantise(X[..., :0]), "floating tensor"),
    "three axes": (lambda: quantise(X[0]), "batch, heads, tokens, head_dim"),
    "no block": (lambda: quantise(X, block=0), "block must be a whole number of at least 1"),
    "a fraction": (lambda: quantise(X, block=1.5), "block must be"),  # pyright: ignore[reportArgumentType]
    "a scale too few": (lambda: spec.dequantise(MADE._replace(block=3)), "scale of x must be float32"),
    "float64 scales": (lambda: spec.dequantise(MADE._replace(scale=MADE.scale.double())), "scale of x must be float32"),
    "not e4m3": (lambda: spec.dequantise(MADE._replace(values=X)), "values of x must be float8_e4m3fn"),
    "a tensor": (lambda: spec.dequantise(X), r"x must be Quantised\("),  # pyright: ignore[reportArgumentType]
    "unlike heads": (lambda: spec.attention_quantised(MADE, quantise(X[..., :4]), MADE), "head_dim of q and k"),
    "signs": (lambda: spec.hadamard(X, torch.ones(9)), r"signs must be one floating number for each coordinate, \[8\]"),
    "heads to turn": (lambda: spec.hadamard(X[0], torch.ones(8)), "x must be a floating tensor"),
    "seed": (lambda: spec.random_signs(8, -1), "seed must be a whole number"),
    "no coordinate": (lambda: spec.random_signs(0, 1), "d must be a whole number"),
}


@pytest.mark.parametrize("call", MEANINGLESS)
def test_what_means_nothing_is_refused(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the shape checks that tests add, the library's own are heard.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    meaningless, message = MEANINGLESS[call]
    with pytest.raises(ValueError, match=message):
        meaningless()
