# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The parts of `flash`'s rotary kernel: its integer turns, its sines, and the launches that a GPU would choose."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from longspan import spec
from longspan.backends import flash
from longspan.backends.flash import rope_choices
from longspan.backends.flash.rope_kernel import cosine_sine, turns_of
from longspan.spec import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))


@triton.jit
def write_turns(inv_freq, out, N: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, turns_of(tl.load(inv_freq + at)))


@triton.jit
def write_cosine_sine(position, turns, cos, sin, N: tl.constexpr):  # noqa: ANN001, ANN201, N803
    at = tl.program_id(0) * N + tl.arange(0, N)
    c, s = cosine_sine(tl.load(position + at), tl.load(turns + at), False)
    tl.store(cos + at, c)
    tl.store(sin + at, s)


def test_the_kernel_counts_turns_bit_for_bit_as_the_specification() -> None:
    draw = torch.Generator().manual_seed(0)
    speed = torch.rand(2**14, dtype=torch.float64, generator=draw)
    speed[1::3] = 10 ** (-15 * speed[1::3])
    speed[2::3] = 1e4 * speed[2::3] - 5e3
    speed[:5] = torch.tensor([torch.pi, -torch.pi, 3 * torch.pi, 0.0, -0.0], dtype=torch.float64)
    found = torch.empty(2**14, dtype=torch.int64, device=DEVICE)
    write_turns[(16,)](speed.to(DEVICE), found, 1024)
    # On the CPU: there torch divides by 2π, where on a GPU it multiplies by the reciprocal.
    assert torch.equal(found.cpu(), spec.turns(speed))


def test_cosine_and_sine_are_exact_to_a_rounding_all_around_the_circle() -> None:
    draw = torch.Generator().manual_seed(0)
    turned = torch.randint(-(2**63), 2**63 - 1, (2**15,), generator=draw)
    edges = torch.arange(-4, 4)[:, None] * 2**61 + torch.tensor([-(2**32), -1, 0, 1, 2**32])
    turned[:40] = edges.flatten()  # both sides of every eighth of a turn, where quarters change
    turned, one = turned.to(DEVICE), torch.ones(2**15, dtype=torch.int64, device=DEVICE)
    cos, sin = torch.empty(2, 2**15, device=DEVICE)
    write_cosine_sine[(32,)](one, turned, cos, sin, 1024)
    theta = (turned >> 11).double() * (2 * torch.pi / 2.0**53)
    assert (cos.double() - theta.cos()).abs().max() < 1.2e-7
    assert (sin.double() - theta.sin()).abs().max() < 1.2e-7


@pytest.mark.parametrize("filled", [1, 1024], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
@pytest.mark.parametrize("sizes", [(32, 8, 3, 64, 0), (5, 1, 20, 12, 16), (1, 3, 7, 4, 80)])
def test_what_a_gpu_would_launch_turns_alike(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], layout: str, filled: int
) -> None:
    h, g, m, planes, tail = sizes
    q, k = (torch.randn(2, n, m, 2 * planes + tail, device=DEVICE).bfloat16() for n in (h, g))
    if layout == "bmhd":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    position = torch.randint(0, 2**31, (2, m), device=DEVICE)
    rotation = Rotation(spec.inv_freq(2 * planes, device=DEVICE))
    expected = flash.rotate_qk(q, k, position, rotation)
    monkeypatch.setattr(rope_choices, "INTERPRETED", False)  # whose tiles are all alike
    monkeypatch.setattr(rope_choices, "FILLED", filled)
    for found, one in zip(flash.rotate_qk(q, k, position, rotation), expected, strict=True):
        assert torch.equal(found, one)


@pytest.mark.parametrize("heads_inside", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("planes", [0, 1, 24, 64, 512])
def test_a_gpu_has_enough_programs_of_tiles_that_fit_its_registers(
    monkeypatch: pytest.MonkeyPatch, planes: int, itemsize: int, heads_inside: bool
) -> None:
    monkeypatch.setattr(rope_choices, "INTERPRETED", False)
    for tokens, count in itertools.product([1, 7, 4096, 2**31], [1, 3, 32, 128]):
        choice = rope_choices.choose_rope(tokens, count, planes, itemsize, heads_inside=heads_inside)
        tile = choice.tokens * choice.heads * rope_choices.power_of_two(planes)
        assert tile * itemsize <= max(1024, 512 * itemsize) * choice.num_warps
        assert tile & (tile - 1) == 0
        programs = -(-tokens // choice.tokens) * choice.split
        assert programs >= rope_choices.FILLED or choice.split * choice.heads >= count
