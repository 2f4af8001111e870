"""Laws of the scaling methods: what each does to fast and slow planes, and what none of them may do."""

import math
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.spec import Rotation, scaling

DIMS: Final = st.integers(2, 128).map(lambda planes: 2 * planes)
BASES: Final = st.sampled_from([1e3, 1e4, 5e5, 1e6, 5e7])
FACTORS: Final = st.floats(1, 64)
LENGTHS: Final = st.sampled_from([256, 1000, 4096, 8192, 32768])

# Every method at factor 1, its length beyond the trained one where it has a length.
UNSCALED: Final[dict[str, Callable[[int, float, int], Rotation]]] = {
    "none": lambda d, base, _: scaling.none(d, base=base),
    "linear": lambda d, base, _: scaling.linear(d, base=base, factor=1),
    "ntk": lambda d, base, _: scaling.ntk(d, base=base, factor=1),
    "dynamic_ntk": lambda d, base, n: scaling.dynamic_ntk(d, base=base, factor=1, original=n, length=n),
    "ntk_by_parts": lambda d, base, n: scaling.ntk_by_parts(d, base=base, factor=1, original=n),
    "yarn": lambda d, base, n: scaling.yarn(d, base=base, factor=1, original=n),
    "yarn_paper": lambda d, base, n: scaling.yarn_paper(d, base=base, factor=1, original=n),
    "llama3": lambda d, base, n: scaling.llama3(d, base=base, factor=1, original=n),
    "longrope": lambda d, base, n: scaling.longrope(
        d, base=base, short_factor=[1] * (d // 2), long_factor=[1] * (d // 2), original=n, length=2 * n
    ),
    "proportional": lambda d, base, _: scaling.proportional(d, base=base),
}


def trained(d: int, base: float) -> Tensor:
    """Speeds without scaling, by the formula of the paper."""
    return torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)


def turns(speed: Tensor, original: int) -> Tensor:
    """Turns over the trained context."""
    return speed * original / (2 * math.pi)


def test_every_method_is_here() -> None:
    assert set(UNSCALED) == set(scaling.__all__)


@pytest.mark.parametrize("method", UNSCALED)
@given(d=DIMS, base=BASES, original=LENGTHS)
def test_a_factor_of_one_is_plain_rope(method: str, d: int, base: float, original: int) -> None:
    rotation = UNSCALED[method](d, base, original)
    torch.testing.assert_close(rotation.inv_freq, trained(d, base), rtol=1e-12, atol=0)
    assert (rotation.attention_factor, rotation.softmax_factor, rotation.axis) == (1.0, 1.0, None)


@given(factor=FACTORS, position=st.integers(0, 10**6), seed=st.integers(0, 2**32 - 1))
def test_linear_at_a_position_is_plain_rope_at_the_position_over_the_factor(
    factor: float, position: int, seed: int
) -> None:
    plain, interpolated = scaling.none(64), scaling.linear(64, factor=factor)
    at = torch.tensor([position])
    x = torch.randn(1, 1, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angle = position / factor * plain.inv_freq
    real, imag = x[0, 0, 0, :32], x[0, 0, 0, 32:]
    expected = torch.cat([real * angle.cos() - imag * angle.sin(), real * angle.sin() + imag * angle.cos()])
    # An angle of 1e6 rad is known to 1e6 · 2^-52.
    torch.testing.assert_close(spec.rotate(x, at, interpolated)[0, 0, 0], expected, rtol=0, atol=1e-8)


@given(d=DIMS, base=BASES, factor=FACTORS)
def test_ntk_keeps_the_first_plane_interpolates_the_last_and_is_a_change_of_base(
    d: int, base: float, factor: float
) -> None:
    speed = scaling.ntk(d, base=base, factor=factor).inv_freq
    assert speed[0] == 1
    assert speed[-1].item() == pytest.approx(trained(d, base)[-1].item() / factor, rel=1e-12)
    torch.testing.assert_close(speed, trained(d, base * factor ** (d / (d - 2))), rtol=1e-11, atol=0)


@given(d=DIMS, base=BASES, factor=FACTORS, original=LENGTHS, part=st.floats(0, 1))
def test_dynamic_ntk_changes_nothing_up_to_the_trained_length(
    d: int, base: float, factor: float, original: int, part: float
) -> None:
    rotation = scaling.dynamic_ntk(d, base=base, factor=factor, original=original, length=int(part * original))
    torch.testing.assert_close(rotation.inv_freq, trained(d, base), rtol=1e-12, atol=0)


@given(d=DIMS, factor=FACTORS, original=LENGTHS, times=st.floats(1, 16))
def test_dynamic_ntk_is_ntk_by_the_stretch_of_the_length(d: int, factor: float, original: int, times: float) -> None:
    length = int(times * original)
    dynamic = scaling.dynamic_ntk(d, factor=factor, original=original, length=length).inv_freq
    static = scaling.ntk(d, factor=factor * length / original - (factor - 1)).inv_freq
    torch.testing.assert_close(dynamic, static, rtol=1e-12, atol=0)


def test_dynamic_ntk_remembers_no_earlier_length() -> None:
    first = scaling.dynamic_ntk(64, factor=2, original=2048, length=3000)
    scaling.dynamic_ntk(64, factor=2, original=2048, length=4096)
    again = scaling.dynamic_ntk(64, factor=2, original=2048, length=3000)
    assert torch.equal(first.inv_freq, again.inv_freq)


@given(factor=FACTORS, lengths=st.lists(st.integers(0, 20_000), min_size=1, max_size=5))
def test_dynamic_ntk_of_a_batch_is_that_of_each_row(factor: float, lengths: list[int]) -> None:
    rows = scaling.dynamic_ntk(32, factor=factor, original=2048, length=torch.tensor(lengths)).inv_freq
    alone = [scaling.dynamic_ntk(32, factor=factor, original=2048, length=length).inv_freq for length in lengths]
    torch.testing.assert_close(rows, torch.stack(alone), rtol=1e-14, atol=0)


RAMPS: Final[dict[str, Callable[..., Rotation]]] = {
    "ntk_by_parts": scaling.ntk_by_parts,
    "yarn": scaling.yarn,
    "yarn_paper": scaling.yarn_paper,
    "llama3": scaling.llama3,
}


@pytest.mark.parametrize("method", RAMPS)
@given(d=DIMS, base=BASES, original=LENGTHS, one=FACTORS, other=FACTORS)
def test_a_ramp_stays_between_trained_and_interpolated_and_falls_as_the_factor_grows(
    method: str, d: int, base: float, original: int, one: float, other: float
) -> None:
    less, more = sorted([one, other])
    wide, narrow = (RAMPS[method](d, base=base, factor=f, original=original).inv_freq for f in (less, more))
    speed, rounding = trained(d, base), 1 + 1e-14
    assert (narrow <= wide * rounding).all()
    assert (narrow <= speed * rounding).all()
    assert (narrow * rounding >= speed / more).all()


@pytest.mark.parametrize(("method", "slow", "fast"), [("llama3", 1, 4), ("yarn_paper", 1, 32), ("ntk_by_parts", 1, 32)])
@given(d=DIMS, base=BASES, original=LENGTHS, factor=FACTORS)
def test_planes_of_many_turns_keep_their_speed_and_planes_of_few_are_divided(
    method: str, slow: int, fast: int, d: int, base: float, original: int, factor: float
) -> None:
    speed = trained(d, base)
    ratio = RAMPS[method](d, base=base, factor=factor, original=original).inv_freq / speed
    often, rarely = turns(speed, original) > fast * 1.0001, turns(speed, original) < slow * 0.9999
    torch.testing.assert_close(ratio[often], torch.ones_like(ratio[often]), rtol=1e-14, atol=0)
    torch.testing.assert_close(ratio[rarely], torch.full_like(ratio[rarely], 1 / factor), rtol=1e-14, atol=0)


def test_the_ramp_of_the_paper_is_linear_in_turns() -> None:
    base = math.e**2  # over d = 4: speeds 1 and 1/e; a context in which plane 1 turns 16.5 times, halfway from 1 to 32
    original = round(16.5 * 2 * math.pi * math.e)
    speed = scaling.ntk_by_parts(4, base=base, factor=3, original=original).inv_freq[1].item()
    keep = (original / (2 * math.pi * math.e) - 1) / 31
    assert keep == pytest.approx(0.5, abs=1e-3)
    assert speed == pytest.approx((keep + (1 - keep) / 3) / math.e, rel=1e-13)


@given(d=DIMS, base=BASES, original=LENGTHS, factor=FACTORS)
def test_llama3_is_the_ramp_of_yarns_paper_from_one_turn_to_four(
    d: int, base: float, original: int, factor: float
) -> None:
    llama = scaling.llama3(d, base=base, factor=factor, original=original)
    parts = scaling.ntk_by_parts(d, base=base, factor=factor, original=original, alpha=1, beta=4)
    torch.testing.assert_close(llama.inv_freq, parts.inv_freq, rtol=1e-15, atol=0)


@given(d=DIMS, base=BASES, original=LENGTHS, factor=FACTORS, edge=st.floats(0.5, 8))
def test_llama3_with_equal_edges_has_no_blend(d: int, base: float, original: int, factor: float, edge: float) -> None:
    rotation = scaling.llama3(
        d, base=base, factor=factor, original=original, low_freq_factor=edge, high_freq_factor=edge
    )
    speed = trained(d, base)
    away = (turns(speed, original) / edge - 1).abs() > 1e-9
    expected = torch.where(turns(speed, original) > edge, speed, speed / factor)
    torch.testing.assert_close(rotation.inv_freq[away], expected[away], rtol=1e-14, atol=0)


@given(d=DIMS, factor=st.floats(1.01, 64))
def test_yarns_temperature_is_a_tenth_of_the_logarithm_more_than_one(d: int, factor: float) -> None:
    expected = 0.1 * math.log(factor) + 1
    for method in (scaling.yarn, scaling.yarn_paper):
        assert method(d, factor=factor, original=4096).attention_factor == pytest.approx(expected, rel=1e-15)


def test_yarns_two_ramps_differ_between_their_ends_and_agree_beyond() -> None:
    code, paper = (f(128, factor=16, original=4096).inv_freq for f in (scaling.yarn, scaling.yarn_paper))
    assert torch.equal(code[:10], paper[:10])  # more than 32 turns
    torch.testing.assert_close(code[52:], paper[52:], rtol=1e-15, atol=0)  # less than one
    assert ((code - paper).abs() / paper)[30:40].min() > 0.1


def test_yarn_truncated_ramps_over_whole_planes() -> None:
    # gpt-oss: between planes 8.09 and 17.4, or 8 and 18 once rounded outward.
    sharp, rounded = (
        scaling.yarn(64, base=150_000, factor=32, original=4096, truncate=truncate).inv_freq / trained(64, 150_000)
        for truncate in (False, True)
    )
    assert sharp[8] == 1 == rounded[8]
    assert sharp[17] > 1 / 32 < rounded[17]
    assert sharp[18].item() == pytest.approx(1 / 32, rel=1e-14)
    assert rounded[13].item() == pytest.approx((1 + 1 / 32) / 2, rel=1e-14)
    assert (sharp[9:18] != rounded[9:18]).all()


def test_yarns_mscale_gives_a_ratio_and_the_softmax_a_square() -> None:
    def strength(mscale: float) -> float:
        return 0.1 * mscale * math.log(40) + 1

    made = scaling.yarn(64, factor=40, original=4096, mscale=1.0, mscale_all_dim=0.707, softmax_mscale=0.707)
    assert made.attention_factor == pytest.approx(strength(1) / strength(0.707), rel=1e-15)
    assert made.softmax_factor == pytest.approx(strength(0.707) ** 2, rel=1e-15)
    assert scaling.yarn(64, factor=40, original=4096, mscale=0.5).attention_factor == pytest.approx(strength(1))
    explicit = scaling.yarn(64, factor=40, original=4096, mscale=1.0, mscale_all_dim=0.707, attention_factor=0.9)
    assert explicit.attention_factor == 0.9


SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 4.0, 8.0, 16.0]


def longrope(length: int | Tensor, **more: Any) -> Rotation:
    """LongRoPE of a small head, trained to 4096 tokens."""
    return scaling.longrope(8, short_factor=SHORT, long_factor=LONG, original=4096, length=length, **more)


@given(length=st.integers(0, 20_000))
def test_longrope_divides_by_the_long_factors_only_beyond_the_trained_length(length: int) -> None:
    divisors = torch.tensor(LONG if length > 4096 else SHORT, dtype=torch.float64)
    torch.testing.assert_close(longrope(length).inv_freq, trained(8, 1e4) / divisors, rtol=1e-15, atol=0)


def test_longrope_switches_after_exactly_the_trained_length_row_by_row() -> None:
    rows = longrope(torch.tensor([4095, 4096, 4097, 1, 9999]), factor=32)
    short, long = longrope(4096).inv_freq, longrope(4097).inv_freq
    assert torch.equal(rows.inv_freq, torch.stack([short, short, long, short, long]))
    assert rows.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-15)


def test_longrope_takes_an_attention_factor_or_one_for_each_side() -> None:
    assert longrope(9999, factor=32, attention_factor=1.5).attention_factor == 1.5
    sides = {"factor": 32.0, "short_mscale": 1.1, "long_mscale": 1.2}
    assert (longrope(4096, **sides).attention_factor, longrope(4097, **sides).attention_factor) == (1.1, 1.2)
    rows = longrope(torch.tensor([4097, 4096]), **sides).attention_factor
    assert isinstance(rows, Tensor)
    assert rows.tolist() == [1.2, 1.1]


def test_rows_of_a_batch_rotate_as_each_would_alone() -> None:
    x = torch.randn(2, 1, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[4093, 4094, 4095], [4097, 4098, 4099]])
    sides = {"short_mscale": 1.1, "long_mscale": 1.2}
    together = spec.rotate(x, at, longrope(at[:, -1] + 1, **sides))
    alone = [spec.rotate(x[row], at[row], longrope(length, **sides)) for row, length in (([0], 4096), ([1], 4100))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=1e-14)


@given(d=DIMS, base=BASES, fraction=st.floats(0.01, 1), factor=FACTORS)
def test_proportional_turns_the_first_planes_at_the_speeds_of_the_whole_head_and_leaves_the_others(
    d: int, base: float, fraction: float, factor: float
) -> None:
    speed = scaling.proportional(d, base=base, fraction=fraction, factor=factor).inv_freq
    turning = int(fraction * d / 2)
    assert speed.shape == (d // 2,)
    torch.testing.assert_close(speed[:turning], trained(d, base)[:turning] / factor, rtol=1e-13, atol=0)
    assert (speed[turning:] == 0).all()
