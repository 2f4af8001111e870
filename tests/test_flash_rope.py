# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The rotary kernels of `flash` against the specification in float64: exact angles, every layout, every derivative."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.spec import Rotation
from longspan.spec.pairing import Pairing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PAIRINGS = st.sampled_from(["half", "interleaved"])
SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=15)  # a quarter of a second each, interpreted; on a GPU, a compilation each


def heads(seed: int, b: int, h: int, m: int, d: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Draw heads [b, h, m, d] that lie in memory as named."""
    draw = torch.Generator().manual_seed(seed)
    match layout:
        case "bmhd":
            x = torch.randn(b, m, h, d, generator=draw).transpose(1, 2)
        case "slice":
            x = torch.randn(b, m, h, d + 5, generator=draw)[..., 3 : 3 + d].transpose(1, 2)
        case _:
            x = torch.randn(b, h, m, d, generator=draw)
    like = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=DEVICE)
    return like.copy_(x)


def positions(seed: int, kind: str, b: int, m: int, largest: int) -> Tensor:
    """Draw positions [m], [b, m] or [3, b, m]."""
    shape = {"m": (m,), "bm": (b, m), "abm": (3, b, m)}[kind]
    return torch.randint(0, largest, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def speeds(planes: int, *, factor: float | Tensor = 1.0, axis: Tensor | None = None) -> Rotation:
    """Make a rotation of planes."""
    return Rotation(spec.inv_freq(2 * planes, device=DEVICE), factor, axis=axis)


def partner(x: Tensor, pairing: Pairing) -> Tensor:
    """The other coordinate of each plane."""
    if pairing == "half":
        return x.roll(x.shape[-1] // 2, -1)
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def assert_turned(found: Tensor, x: Tensor, position: Tensor, rotation: Rotation, pairing: Pairing) -> None:
    """Compare a rotation with the truth, by a budget known before; the tail bit for bit."""
    turned = 2 * rotation.inv_freq.shape[-1]
    truth = spec.rotate(x.double(), position, rotation, pairing=pairing)[..., :turned]
    head = x[..., :turned].double()
    factor = torch.as_tensor(rotation.attention_factor).abs().reshape(-1, 1, 1, 1).to(head)
    length = factor * (head**2 + partner(head, pairing) ** 2).sqrt()
    info = torch.finfo(x.dtype)
    budget = 2 * (info.eps * truth.abs() + (3e-7 + 4 * torch.finfo(torch.float32).eps) * length)
    budget = budget + (info.tiny * info.eps if x.dtype == torch.float16 else info.tiny)  # what underflows
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert not (found[..., :turned].double() - truth).abs().gt(budget).any()
    assert not found.isnan().any()
    assert torch.equal(found[..., turned:], x[..., turned:])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw queries, keys, positions and a rotation that fit each other."""
    b, m = draw(st.integers(1, 4), label="b"), draw(st.sampled_from([0, 1, 2, 7, 16, 17, 33]), label="m")
    h, g = draw(st.integers(1, 5), label="h"), draw(st.integers(1, 3), label="g")
    planes, tail = draw(st.sampled_from([1, 4, 12, 32, 36]), label="planes"), draw(st.sampled_from([0, 8, 10]))
    dtype, seed = draw(DTYPES, label="dtype"), draw(SEEDS, label="seed")
    layouts = st.sampled_from(["bhmd", "bmhd", "slice"])
    axis = torch.randint(0, 3, (planes,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    rotation = speeds(planes, factor=draw(st.sampled_from([1.0, 1.3466]), label="factor"), axis=axis)
    if draw(st.booleans(), label="a row for each sequence"):
        slower = torch.linspace(0.1, 1.0, b, dtype=torch.float64, device=DEVICE)
        rotation = Rotation(rotation.inv_freq * slower[:, None], 2 - slower, axis=axis)
    kind = draw(st.sampled_from(["m", "bm", "abm"]), label="positions")
    return {
        "q": heads(seed, b, h, m, 2 * planes + tail, dtype, draw(layouts, label="q lies")),
        "k": heads(seed + 1, b, g, m, 2 * planes + tail, dtype, draw(layouts, label="k lies")),
        "position": positions(seed, kind, b, m, draw(st.sampled_from([64, 2**20, 2**31]), label="largest")),
        "rotation": rotation,
        "pairing": draw(PAIRINGS, label="pairing"),
    }


@few
@given(problems())
def test_queries_and_keys_turn_exactly_at_every_position(problem: dict) -> None:
    q, k, *rest, pairing = problem.values()
    turned_q, turned_k = flash.rotate_qk(q, k, *rest, pairing=pairing)
    assert_turned(turned_q, q, *rest, pairing)
    assert_turned(turned_k, k, *rest, pairing)
    assert torch.equal(flash.rotate(q, *rest, pairing=pairing), turned_q)


@few
@given(problems())
def test_turning_in_place_is_turning_out_of_place(problem: dict) -> None:
    q, k, *rest, pairing = problem.values()
    expected = flash.rotate_qk(q, k, *rest, pairing=pairing)
    assert flash.rotate_qk_(q, k, *rest, pairing=pairing)[0] is q
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    again = flash.rotate(k, *rest, pairing=pairing)
    assert torch.equal(flash.rotate_(k, *rest, pairing=pairing), again)


@few
@given(problems())
def test_the_gradient_is_the_inverse_rotation(problem: dict) -> None:
    q, k, position, rotation, pairing = problem.values()
    q, k = q.requires_grad_(), k.requires_grad_()
    out = flash.rotate_qk(q, k, position, rotation, pairing=pairing)
    cotangents = [torch.randn_like(x) for x in out]
    back = Rotation(-rotation.inv_freq, rotation.attention_factor, axis=rotation.axis)
    for found, given_back in zip(torch.autograd.grad(out, (q, k), cotangents), cotangents, strict=True):
        assert_turned(found, given_back, position, back, pairing)


def test_a_gradient_reaches_keys_alone_and_through_an_expanded_sum() -> None:
    q, k = heads(0, 2, 4, 5, 24, torch.float32, "bmhd"), heads(1, 2, 1, 5, 24, torch.float32, "bhmd").requires_grad_()
    position, rotation = positions(0, "m", 2, 5, 999), speeds(8, factor=1.5)
    (found,) = torch.autograd.grad(flash.rotate_qk(q, k, position, rotation)[1].sum(), k)
    back = Rotation(-rotation.inv_freq, 1.5)
    assert_turned(found, torch.ones_like(k), position, back, "half")


def test_the_second_derivative_is_right() -> None:
    x = heads(0, 2, 3, 4, 12, torch.float32, "bhmd").requires_grad_()
    position, rotation = positions(0, "bm", 2, 4, 999), speeds(4, factor=1.25)

    def second(rotate: Any, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((rotate(x, position, rotation) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    truth = second(spec.rotate, x.detach().double().requires_grad_())
    assert (second(flash.rotate, x).double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_a_tangent_is_refused_and_not_dropped() -> None:
    x, position = heads(0, 1, 1, 2, 8, torch.float32, "bhmd"), positions(0, "m", 1, 2, 9)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: flash.rotate(x, position, speeds(4)), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        flash.rotate(torch.autograd.forward_ad.make_dual(x, x), position, speeds(4))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Unsupported, match="in place"):
        flash.rotate_(torch.autograd.forward_ad.make_dual(x, x), position, speeds(4))
    with pytest.raises(Unsupported, match="in place"):
        torch.vmap(lambda x: flash.rotate_(x, position, speeds(4)))(x[None])


def test_keys_move_from_one_rotation_to_another() -> None:
    k, position = heads(0, 2, 2, 9, 40, torch.float32, "bmhd"), positions(0, "bm", 2, 9, 2**20)
    old, new = speeds(16, factor=1.25), Rotation(spec.inv_freq(32, base=5e5, device=DEVICE), 1.5)
    between = Rotation(new.inv_freq - old.inv_freq, 1.5 / 1.25)
    assert_turned(flash.rerotate(k, position, old, new), k, position, between, "half")


def test_a_tensor_turned_in_place_leaves_its_neighbours_alone() -> None:
    wide = torch.randn(2, 5, 3, 50, device=DEVICE)
    before, x = wide.clone(), wide[:, 1:4, :, 7:31].transpose(1, 2)
    flash.rotate_(x, positions(0, "m", 2, 3, 99), speeds(10))
    assert not torch.equal(wide, before)
    wide[:, 1:4, :, 7:27] = before[:, 1:4, :, 7:27]
    assert torch.equal(wide, before)


@pytest.mark.parametrize("inside", [True, False], ids=["heads inside tokens", "tokens inside heads"])
def test_offsets_beyond_32_bits_are_offsets(inside: bool) -> None:
    far = 2**30 + 8
    backing = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)  # on a CPU, pages that are never touched
    x = backing.as_strided((1, 3, 2, 8), (0, far, 8, 1) if inside else (0, 8, far, 1))
    x = x if inside else backing.as_strided((1, 2, 3, 8), (0, 8, far, 1))
    x.copy_(torch.randn(x.shape))
    copy, position = x.clone(memory_format=torch.contiguous_format), positions(0, "m", 1, x.shape[2], 999)
    flash.rotate_(x, position, speeds(4))
    assert_turned(x.clone(memory_format=torch.contiguous_format), copy, position, speeds(4), "half")


def refused(**changes: Any) -> None:
    """Rotate with changes to a call that is served."""
    x = torch.randn(2, 3, 4, 16, device=DEVICE)
    given_x = changes.pop("x", lambda x: x)(x)
    operation = changes.pop("operation", flash.rotate)
    rotation = Rotation(**{"inv_freq": spec.inv_freq(8, device=DEVICE), **changes})
    operation(given_x, torch.arange(4, device=DEVICE), rotation)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": Tensor.double}, "float64"),
        ({"x": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)}, "last stride"),
        ({"x": lambda x: torch.zeros(2, 3, 4, 1032, device=x.device)}, "1024"),
        ({"inv_freq": torch.ones(4, dtype=torch.float64, device=DEVICE, requires_grad=True)}, "inv_freq"),
        (
            {
                "inv_freq": torch.ones(2, 4, dtype=torch.float64, device=DEVICE),
                "attention_factor": torch.ones(2, dtype=torch.float64, device=DEVICE, requires_grad=True),
            },
            "attention_factor",
        ),
        ({"x": Tensor.requires_grad_, "operation": flash.rotate_}, "gradient"),
        ({"x": lambda x: x[:1].expand(2, -1, -1, -1), "operation": flash.rotate_}, "expanded"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_served_is_said(changes: dict, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        refused(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inv_freq": torch.ones(9, dtype=torch.float64, device=DEVICE)}, "at most d / 2"),
        ({"inv_freq": torch.ones(3, 4, dtype=torch.float64, device=DEVICE)}, "inv_freq must be float64"),
        ({"x": lambda x: x[:, :, :3]}, "position"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_means_nothing_is_an_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(**changes)
