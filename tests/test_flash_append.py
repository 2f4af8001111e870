# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""`flash.append_` against the specification: what is written, where, and what is left alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.spec import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))


def lay(x: Tensor, layout: str) -> Tensor:
    """Copy [a, h, b, d] to memory as named: heads outside, heads inside, or a slice of something wider."""
    if layout == "inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    return x.contiguous()


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Draw new tokens, caches, slots and a rotation or none."""
    tokens, g = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), label="tokens"), draw(st.integers(1, 3), label="g")
    planes, tail = draw(st.sampled_from([1, 4, 12, 32])), draw(st.sampled_from([0, 6, 8]))
    d, e = 2 * planes + tail, draw(st.sampled_from([1, 8, 24, 64]), label="e")
    size = draw(st.sampled_from([1, 3, 16, 64]), label="size")
    rows = -(-tokens // size) + draw(st.integers(1, 3), label="spare rows")
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1), label="seed"))
    layouts = st.sampled_from(["outside", "inside", "slice"])

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=source).to(dtype).to(DEVICE)
        return lay(x, draw(layouts)) if len(shape) == 4 else lay(x[None], draw(layouts))[0]

    slot = torch.randperm(rows * size, generator=source)[:tokens]
    slot[torch.rand(tokens, generator=source) < 0.2] = -1
    slot = slot.to(draw(st.sampled_from([torch.int32, torch.int64]), label="slots")).to(DEVICE)
    options: dict[str, Any] = {}
    if draw(st.booleans(), label="rotate"):
        each = draw(st.booleans(), label="a speed for each token")
        inv_freq = torch.rand([tokens, planes] if each else [planes], generator=source, dtype=torch.float64)
        factor = torch.rand(tokens, generator=source, dtype=torch.float64).to(DEVICE) if each else 1.25
        axis = torch.randint(0, 3, (planes,), generator=source).to(DEVICE)
        shape = draw(st.sampled_from([(tokens,), (3, tokens)]), label="positions")
        position = torch.randint(0, 2**31, shape, generator=source).to(DEVICE)
        rotation = Rotation(inv_freq.to(DEVICE), factor, axis=axis)
        pairing = draw(st.sampled_from(["half", "interleaved"]), label="pairing")
        options = {"position": position, "rotation": rotation, "pairing": pairing}
    tensors = (normal(tokens, g, d), normal(tokens, g, e), normal(rows, g, size, d), normal(rows, g, size, e), slot)
    return tensors, options


def untouched(cache: Tensor, slot: Tensor) -> Tensor:
    """Tell the columns [rows, size] that no slot names."""
    rest = torch.ones(cache.shape[0] * cache.shape[2], dtype=torch.bool, device=cache.device)
    rest[slot[slot >= 0].long()] = False
    return rest.reshape(cache.shape[0], cache.shape[2])


@settings(max_examples=25)
@given(problems())
def test_slots_hold_the_new_tokens_and_all_else_what_it_held(problem: tuple) -> None:
    (k, v, k_cache, v_cache, slot), options = problem
    keys, values = spec.append(k.double(), v.double(), k_cache.double(), v_cache.double(), slot, **options)
    before = k_cache.clone(), v_cache.clone()
    assert flash.append_(k, v, k_cache, v_cache, slot, **options) is None
    assert torch.equal(v_cache.double(), values)
    eps = torch.finfo(k.dtype).eps
    # A plane is no longer than its head; the angle and the arithmetic are good to a few float32 roundings of that.
    length = k.double().norm(dim=-1).max() * 2 if k.numel() else 0.0
    tiny = 1e-7 if k.dtype == torch.float16 else 0.0
    assert not (k_cache.double() - keys).abs().gt(2 * (eps * keys.abs() + 8e-7 * length) + tiny).any()
    rest = untouched(k_cache, slot)
    for cache, was in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(cache.transpose(1, 2)[rest], was.transpose(1, 2)[rest])


def call(**changes: Any) -> tuple[dict[str, Any], Rotation, Tensor]:
    """Make a call: four tokens to a cache of two rows of three."""
    of = {
        "k": torch.randn(4, 2, 8, device=DEVICE),
        "v": torch.randn(4, 2, 6, device=DEVICE),
        "k_cache": torch.zeros(2, 2, 3, 8, device=DEVICE),
        "v_cache": torch.zeros(2, 2, 3, 6, device=DEVICE),
        "slot": torch.tensor([5, -1, 0, 3], device=DEVICE),
    }
    return of | changes, Rotation(spec.inv_freq(8, device=DEVICE)), torch.arange(4, device=DEVICE)


def test_appending_rotates_as_rotate_does_bit_for_bit() -> None:
    of, rotation, position = call()
    flash.append_(**of, position=position, rotation=rotation)
    turned = flash.rotate(of["k"].unsqueeze(2), position.unsqueeze(1), rotation)[:, :, 0]
    assert torch.equal(of["k_cache"][1, :, 2], turned[0])
    assert torch.equal(of["k_cache"][0, :, 0], turned[2])
    assert torch.equal(of["k_cache"][1, :, 0], turned[3])
    assert of["k_cache"][0, :, 1:].count_nonzero() == 0


def test_a_slot_outside_the_cache_overwrites_nothing() -> None:
    wide = torch.zeros(4, 2, 3, 8, device=DEVICE)
    of, *_ = call(k_cache=wide[1:3], slot=torch.tensor([6, 11, -2, 2**40], device=DEVICE))
    flash.append_(**of)
    assert wide.count_nonzero() == 0
    assert of["v_cache"].count_nonzero() == 0


def test_offsets_beyond_32_bits_are_offsets() -> None:
    far = 2**30 + 8
    backing = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)  # on a CPU, pages that are never touched
    cache = backing.as_strided((3, 2, 1, 8), (far, 8, 16, 1))
    cache.fill_(0.0)
    k = torch.randn(2, 2, 8, device=DEVICE).half()
    flash.append_(k, k, cache, torch.zeros_like(cache), torch.tensor([2, 0], device=DEVICE))
    assert torch.equal(cache[2, :, 0], k[0])
    assert torch.equal(cache[0, :, 0], k[1])
    assert cache[1].count_nonzero() == 0


def test_a_compiled_call_is_one_graph() -> None:
    of, rotation, position = call()
    again = {name: x.clone() for name, x in of.items()}

    def write(**of: Tensor) -> None:
        flash.append_(**of, position=position, rotation=rotation)

    torch.compile(write, fullgraph=True, backend="aot_eager")(**of)
    write(**again)
    assert torch.equal(of["k_cache"], again["k_cache"])
    assert torch.equal(of["v_cache"], again["v_cache"])
    assert of["k_cache"].count_nonzero() > 0


def test_the_operator_tells_torch_the_truth_about_itself() -> None:
    of, rotation, position = call()
    rest = (position.unsqueeze(1), rotation.inv_freq, None, None, 1.0, False)
    torch.library.opcheck(torch.ops.longspan.flash_append_.default, (*of.values(), *rest))


DOUBLE = torch.ones(2, 2, 3, 6, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"k": torch.ones(4, 2, 8, device=DEVICE, requires_grad=True)}, "no gradient"),
        ({"v_cache": torch.ones(2, 2, 3, 6, device=DEVICE, requires_grad=True)}, "no gradient"),
        ({"k_cache": torch.zeros(1, 2, 3, 8, device=DEVICE).expand(2, -1, -1, -1)}, "expanded"),
        ({"v": torch.ones(4, 6, 2, device=DEVICE).transpose(1, 2)}, "last stride"),
        ({"v": torch.ones(4, 2, 6, device=DEVICE).double(), "v_cache": DOUBLE}, "float64"),
    ],
    ids=["a gradient of k", "a gradient of a cache", "an expanded cache", "strided values", "float64"],
)  # fmt: skip
def test_what_is_not_served_is_said(changes: dict, reason: str) -> None:
    of, *_ = call(**changes)
    assert reason in str(flash.declines("append_", **of))
    with pytest.raises(Unsupported, match=reason):
        flash.append_(**of)


def test_what_means_nothing_is_an_error() -> None:
    of, rotation, position = call()
    with pytest.raises(ValueError, match="given together"):
        flash.append_(**of, rotation=rotation)
    with pytest.raises(ValueError, match="one integer per token"):
        flash.append_(**of | {"slot": torch.zeros(3, dtype=torch.int64, device=DEVICE)})
    with pytest.raises(ValueError, match="pairing"):
        flash.append_(**of, rotation=rotation, position=position, pairing="neox")
