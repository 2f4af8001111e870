"""Attention of `hopper` to quantised heads: what it declines, how values are laid out, and on an H200 its numbers."""

import importlib
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported
from longspan.laws import worst
from longspan.laws.quantised import quantised_bounds
from longspan.spec import Quantised, masks, quantise

hopper = pytest.importorskip("longspan.backends.hopper", exc_type=ImportError)
values = pytest.importorskip("longspan.backends.hopper.values", exc_type=ImportError)

on_hopper = pytest.mark.skipif(hopper.unavailable() is not None, reason="needs an H100 or H200")
DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"


def heads(seed: int, b: int = 2, h: int = 2, n: int = 40, d: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw heads."""
    x = torch.randn(b, h, n, d, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


@given(seed=st.integers(0, 1000), n=st.integers(0, 70))
def test_values_are_laid_out_in_the_order_of_registers(seed: int, n: int) -> None:
    v = quantise(heads(seed, n=n).cpu())
    laid = values.laid_out(v)
    assert laid.values.shape == (2, 2, 32, -(-n // 16) * 16)
    for key in range(laid.values.shape[3]):
        u, t, c = key % 16 // 8, key % 8 // 2, key % 2
        column = laid.values[..., key // 16 * 16 + 4 * t + 2 * u + c].float()
        expected = v.values[:, :, key].float() if key < n else torch.zeros_like(column)
        assert torch.equal(column, expected)
    back = values.natural(laid)
    assert torch.equal(back.values.float(), v.values.float())
    assert torch.equal(back.scale, v.scale)


def on_grid(seed: int, n: int, d: int) -> Tensor:
    """Draw heads that e4m3 holds exactly under a scale of 2^-2: an interpreter rounds to it wrongly."""
    x = (100 * heads(seed, 2, 3, n, d)).clamp(-448, 448)
    x[:, :, n // 2, d - 1] = 448
    x = x.to(torch.float8_e4m3fn).float()
    return torch.where(x.abs() < 2**-6, 0.0, x) / 4


@pytest.mark.skipif(
    DEVICE == "cuda" and hopper.unavailable() is not None, reason="needs an interpreter, or an H100 or H200"
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "d"), [(1, 16), (77, 64), (300, 48), (130, 128)])
def test_kernels_quantise_as_the_specification(n: int, d: int, dtype: torch.dtype) -> None:
    launch = pytest.importorskip("longspan.backends.hopper.quantise_launch", exc_type=ImportError)
    whole = torch.empty(2, n, 3, d, dtype=dtype, device=DEVICE).transpose(1, 2)
    x = whole.copy_(on_grid(n, n, d))
    x[1, 2] = 0.0
    expected = quantise(x)
    made = Quantised(*launch.quantised(x))
    laid = values.Values(*launch.quantised(x, values=True), n)
    for one in (made, values.natural(laid)):
        assert torch.equal(one.values.float(), expected.values.float())
        assert torch.equal(one.scale, expected.scale)
    assert torch.equal(laid.values.float(), values.laid_out(expected).values.float())


MADE: Final = [quantise(heads(i)) for i in range(3)]
ON_CPU: Final = [quantise(heads(i).cpu()) for i in range(3)]


def test_a_cpu_is_declined_by_name() -> None:
    assert "runs on a GPU" in str(hopper.declines("attention_quantised", *ON_CPU))
    with pytest.raises(Unsupported, match="runs on a GPU"):
        hopper.attention_quantised(*ON_CPU)
    q = heads(0).cpu()
    assert "runs on a GPU" in str(hopper.declines("quantise", q, q, q))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is declined before anything else")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 5.0}, "does not serve softcap"),
        ({"sink": torch.zeros(2)}, "add_sink adds it"),
        ({"alibi": torch.zeros(2)}, "does not serve alibi"),
        ({"scale": -1.0}, "scales from 0"),
        ({"out_dtype": torch.float64}, "returns fp16, bf16 or fp32"),
        ({"mask": masks.lengths([3, 5])}, "alike for every sequence"),
        ({"mask": masks.documents([20, 20], [20, 20])}, "alike for every sequence"),
    ],
)
def test_what_is_not_served_is_declined_by_name(options: dict[str, Any], reason: str) -> None:
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    assert reason in str(hopper.declines("attention_quantised", *MADE, **options))
    with pytest.raises(Unsupported, match=reason):
        hopper.attention_quantised(*MADE, **options)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is declined before anything else")
def test_heads_that_are_not_served_are_declined_by_name() -> None:
    blocks = [quantise(heads(i), block=16) for i in range(3)]
    assert "one scale a head" in str(hopper.declines("attention_quantised", *blocks))
    narrow = [quantise(heads(i, d=24)) for i in range(3)]
    assert "steps of 16" in str(hopper.declines("attention_quantised", *narrow))
    q = heads(0, d=24)
    assert "steps of 16" in str(hopper.declines("quantise", q, q, q))
    assert "turns fp16 and bf16" in str(hopper.declines("quantise", *[heads(0)] * 3, signs=torch.ones(32).to(DEVICE)))


def test_heads_that_the_copy_engine_cannot_address_are_declined_by_name() -> None:
    declined = importlib.import_module("longspan.backends.hopper.fp8").declines_heads
    k = MADE[1]
    turned = k.values.transpose(2, 3).contiguous().transpose(2, 3)
    room = k.values.new_empty(k.values.numel() + 1)[1:].view(k.values.shape)
    for values_of, reason in ((turned, "whose last stride is 1"), (room, "multiples of 16 bytes; k is not")):
        assert str(declined("k", k._replace(values=values_of))).startswith("hopper.attention_quantised reads tensors")
        assert reason in str(declined("k", k._replace(values=values_of)))
    assert declined("k", k) is None


def test_what_means_nothing_is_refused_as_by_the_specification() -> None:
    q, k, v = MADE
    with pytest.raises(ValueError, match="head_dim of q and k"):
        hopper.attention_quantised(q, quantise(heads(1, d=16)), v)
    with pytest.raises(ValueError, match=r"v must be Quantised\("):
        hopper.attention_quantised(q, k, heads(2))
    with pytest.raises(ValueError, match="v must be Values as quantise makes them"):
        hopper.attention_quantised(q, k, values.laid_out(v)._replace(n=60))
    with pytest.raises(ValueError, match="signs must be one number for each coordinate"):
        hopper.quantise(*[heads(0)] * 3, signs=torch.ones(3).to(DEVICE))


@on_hopper
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@given(data=st.data())
def test_attention_is_its_definition(d: int, data: st.DataObject) -> None:
    draw = data.draw
    seen = draw(st.sampled_from(["everything()", "causal()", "causal() & window(100)", "window(30, ahead=50)"]))
    mask: Any = eval(seen, {**vars(masks)})  # noqa: S307 - our own source
    m, n = draw(st.sampled_from([(256, 256), (1, 77), (300, 300), (513, 900), (700, 333), (37, 1), (128, 1024)]))
    group, mean = draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 1.0, 5.0]))
    seed = draw(st.integers(0, 10_000))
    q, k, v = (heads(seed + i, 2, h, t, d) for i, (h, t) in enumerate([(2 * group, m), (2, n), (2, n)]))
    unseen = ~spec.visible(spec.bounds(mask, 2, m, n, device=DEVICE), n).any(1)[:, None, :, None]
    made = hopper.quantise(q, k.masked_fill(unseen, torch.nan), (v + mean).masked_fill(unseen, torch.nan))
    out_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    state = hopper.attention_quantised(*made, mask=mask, out_dtype=out_dtype)
    again = hopper.attention_quantised(*made[:2], values.natural(made[2]), mask=mask, out_dtype=out_dtype)
    assert torch.equal(state.out, again.out)
    assert torch.equal(state.lse, again.lse)
    heads_of = [quantise(x.masked_fill(unseen, 0.0) if i else x) for i, x in enumerate((q, k, v + mean))]
    bound = quantised_bounds(*heads_of, mask=mask, out_dtype=out_dtype)
    assert worst("out", state.out, bound["out"]) <= 1
    assert worst("lse", state.lse, bound["lse"]) <= 1
