"""Rotations turn by exact angles, in either pairing, by any axis; and integers know the angles too."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from longspan.laws import Rotate
from longspan.laws.strategies import rotates
from longspan.spec import Rotation, angle, angle_of_turns, inv_freq, rerotate, rotate, scaling, turns
from longspan.spec.pairing import join, split

POSITIONS = st.integers(0, 2**31 - 1)
PI = Fraction(  # 60 digits
    314159265358979323846264338327950288419716939937510582097494, 10**59
)


@given(rotates(dtype="float64", position="m", rows=False, largest=2**20))
def test_a_rotation_is_multiplication_by_a_complex_number(problem: Rotate) -> None:
    of = problem.inputs()
    planes = of.rotation.inv_freq.shape[-1]
    real, imag = split(of.q[..., : 2 * planes], problem.pairing)
    theta = of.position[:, None].double() * of.rotation.inv_freq
    turned = torch.complex(real, imag) * torch.polar(torch.full_like(theta, problem.attention_factor), theta)
    truth = torch.cat([join(turned.real, turned.imag, problem.pairing), of.q[..., 2 * planes :]], -1)
    torch.testing.assert_close(rotate(of.q, of.position, of.rotation, pairing=problem.pairing), truth)


@given(POSITIONS, st.sampled_from([1e4, 5e5, 1e6]), st.integers(0, 63))
def test_angles_are_exact_below_2_to_the_31(position: int, base: float, plane: int) -> None:
    """Within 3e-7 rad of rational arithmetic, where a float32 product is off by radians."""
    speed = inv_freq(128, base=base)[plane : plane + 1]
    exact = Fraction(speed.item()) * position
    here = torch.tensor([position])
    for found in (angle(here, Rotation(speed)), angle_of_turns(here, turns(speed))):
        off = (Fraction(found.item()) - exact) / (2 * PI)
        assert abs(off - round(off)) * 2 * PI < 3e-7


def test_float32_angles_are_not() -> None:
    """Why the angle is float64: at a million tokens a float32 product is off by hundredths of a radian."""
    position = torch.arange(2**20 - 4096, 2**20)
    product = position[:, None].float() * inv_freq(128, base=5e5).float()
    off = (product.double() - angle(position, Rotation(inv_freq(128, base=5e5)))).abs().max()
    assert 1e-2 < off < 1e-1


@given(st.floats(-20, 20), POSITIONS)
def test_turns_wrap_at_whole_turns(speed: float, position: int) -> None:
    """Speeds beyond half a turn a token, and negative ones, are the same turns."""
    here = torch.tensor([position])
    whole = angle_of_turns(here, turns(torch.tensor([speed], dtype=torch.float64)))
    product = math.remainder(speed * position, 2 * math.pi) if abs(speed * position) < 2**31 else None
    assert -math.pi <= whole.item() <= math.pi
    if product is not None:
        assert abs(math.remainder(whole.item() - product, 2 * math.pi)) < 5e-6


@given(rotates(rows=False))
def test_pairings_differ_by_a_permutation(problem: Rotate) -> None:
    """Evens then odds: what converts a checkpoint from one pairing to the other."""
    of = problem.inputs()
    planes = of.rotation.inv_freq.shape[-1]
    tail = torch.arange(2 * planes, problem.d)
    order = torch.cat([torch.arange(0, 2 * planes, 2), torch.arange(1, 2 * planes, 2), tail])
    half = rotate(of.q[..., order], of.position, of.rotation, pairing="half")
    assert torch.equal(half, rotate(of.q, of.position, of.rotation, pairing="interleaved")[..., order])


def test_an_axis_drives_its_planes() -> None:
    """M-RoPE: planes of axis 1 read position row 1, and equal axes are plain RoPE."""
    x, rotation = torch.randn(1, 1, 4, 8, dtype=torch.float64), scaling.none(8)
    axis = torch.tensor([0, 1, 2, 1])
    split_axes = Rotation(rotation.inv_freq, axis=axis)
    position = torch.randint(100, (3, 1, 4))
    found = rotate(x, position, split_axes)
    for p in range(4):
        plain = rotate(x, position[axis[p]], rotation)
        assert torch.equal(found[..., [p, p + 4]], plain[..., [p, p + 4]])
    text = rearrange(position[0], "1 m -> m")
    assert torch.equal(rotate(x, position[:1].expand(3, 1, 4), split_axes), rotate(x, text, rotation))


def test_rows_turn_each_sequence_at_its_own_speed() -> None:
    x, position = torch.randn(2, 3, 5, 8), torch.arange(5)
    speeds = torch.stack([inv_freq(8), inv_freq(8) / 2])
    factors = torch.tensor([1.0, 1.5], dtype=torch.float64)
    both = rotate(x, position, Rotation(speeds, factors))
    for b in range(2):
        alone = rotate(x[b : b + 1], position, Rotation(speeds[b], float(factors[b])))
        assert torch.equal(both[b : b + 1], alone)


def test_keys_move_between_rotations_on_different_axes() -> None:
    """Angles subtract, whichever axis each comes from; speeds would not."""
    position, plain = torch.randint(100, (3, 1, 4)), scaling.none(8)
    old, new = replace(plain, axis=torch.tensor([0, 1, 2, 2])), replace(scaling.linear(8, factor=2.0), axis=None)
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    moved = rerotate(rotate(x, position, old), position, old, new)
    torch.testing.assert_close(moved, rotate(x, position, new))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_heads_turn_by_high_precision_angles(dtype: torch.dtype) -> None:
    """At a million tokens the only rounding left is that of the result."""
    x = torch.randn(1, 1, 64, 128, dtype=torch.float64).to(dtype)
    position = torch.arange(2**20, 2**20 + 64)
    rotation = scaling.none(128, base=5e5)
    off = (rotate(x, position, rotation).double() - rotate(x.double(), position, rotation)).abs()
    assert off.max() <= torch.finfo(dtype).eps * x.abs().max().double() * math.sqrt(2)
