"""Few queries against many keys, in `flash`, against exact attention in float64: any tiles, any number of splits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.backends import Unsupported, flash
from longspan.backends.flash import decode
from longspan.backends.flash.decode_choices import FewChoice, FewKey, choose_few, splits_for
from longspan.laws.budget import attention_bounds, worst
from longspan.laws.problems import Attention
from longspan.laws.strategies import HEAD_DIMS, attentions
from longspan.spec import masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
few = settings(max_examples=15 if DEVICE == "cpu" else 60)

SERVED = st.sampled_from(["float32", "bfloat16", "float16"])
CHOICES = st.builds(
    FewChoice, tile_m=st.sampled_from([16, 32]), tile_n=st.sampled_from([16, 32]), num_warps=st.just(4),
    num_stages=st.just(1), splits=st.sampled_from([1, 2, 3, 7]), descriptors=st.booleans(),
)  # fmt: skip


@st.composite
def problems(draw: st.DrawFn, **fixed: Any) -> Attention:
    """Draw a problem of few queries that the backend serves."""
    return draw(
        attentions(**{
            "m": draw(st.integers(1, 7)), "n": draw(st.sampled_from([0, 1, 16, 33, 64, 100])), "dtype": draw(SERVED),
            "d": draw(st.one_of(st.just(16), HEAD_DIMS)), "b": draw(st.integers(1, 2)), **fixed,
        })
    )  # fmt: skip


@contextmanager
def cut(choice: FewChoice) -> Iterator[None]:
    """Launch with one choice, on every problem that few queries may have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decode, "choose_few", lambda key: replace(choice, descriptors=choice.descriptors and key.descriptors)
        )
        patch.setattr(decode, "few", lambda *_: True)
        yield


def assert_exact(problem: Attention) -> None:
    """Compare out and lse with their budgets."""
    of = problem.inputs(DEVICE)
    state = flash.attention(*of.arguments, **of.options)
    bound = attention_bounds(*of.arguments, **of.options)
    assert worst("out", state.out, bound["out"]) <= 1
    assert worst("lse", state.lse, bound["lse"]) <= 1


@few
@given(problems(), CHOICES)
def test_any_tiles_and_any_split_are_exact(problem: Attention, choice: FewChoice) -> None:
    with cut(choice):
        assert_exact(problem)


@few
@given(problems(mask="causal() & window(20, keep_first=5)", sink=1.0, softcap=5.0, alibi=0.5), CHOICES)
def test_a_window_with_every_option_is_exact(problem: Attention, choice: FewChoice) -> None:
    with cut(choice):
        assert_exact(problem)


@pytest.mark.parametrize(
    "problem",
    [
        Attention(m=2, n=40, d=576, e=512, h=16, mask="causal()", seed=1),
        Attention(m=3, n=40, d=320, e=264, h=4, g=2, dtype="float16", seed=2, k_storage="slice"),
        Attention(m=1, n=40, d=1024, e=8, dtype="bfloat16", seed=3),
        Attention(m=1, n=40, d=264, e=16, dtype="bfloat16", mask="lengths([17])", dead=float("nan"), seed=4),
    ],
    ids=str,
)
def test_heads_wider_than_256_are_exact_and_have_no_gradient(problem: Attention) -> None:
    assert_exact(problem)
    of = problem.inputs(DEVICE)
    with pytest.raises(Unsupported, match="up to 256"):
        flash.attention(of.q.requires_grad_(), of.k, of.v, **of.options)


def test_values_that_are_the_first_columns_of_the_keys_are_read_once() -> None:
    of = Attention(m=2, n=50, d=320, e=256, h=4, mask="lengths([41])", dead=float("nan")).inputs(DEVICE)
    assert decode.alike(of.k, of.k[..., :256])
    assert not decode.alike(of.k, of.v)
    assert not decode.alike(of.k, of.k[..., :128])
    found = flash.attention(of.q, of.k, of.k[..., :256], **of.options)
    expected = flash.attention(of.q, of.k, of.k[..., :256].clone(), **of.options)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)


def test_keys_further_apart_than_32_bits_can_say_are_found() -> None:
    # Untouched pages of these 400 MB are never given memory.
    stride = 2**26
    room = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE)
    far = room.as_strided((1, 1, 3, 16), (3 * stride, 3 * stride, stride, 1))
    near = torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    far.copy_(near)
    with cut(FewChoice(tile_m=16, tile_n=32, num_warps=4, num_stages=1, splits=2)):
        found, expected = flash.attention(far, far, far), flash.attention(near, near, near)
    assert torch.equal(found.out, expected.out)


def test_lengths_that_only_the_device_knows_are_split_evenly() -> None:
    of = Attention(b=3, m=1, n=96, h=2, mask="lengths([96, 3, 0])", dead=float("nan")).inputs(DEVICE)
    parts = []
    with (
        cut(FewChoice(tile_m=16, tile_n=16, num_warps=4, num_stages=1, splits=3)),
        pytest.MonkeyPatch.context() as patch,
    ):
        kernel = decode.few_merge_kernel

        class Seen:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **kwargs: (parts.append(args[1].clone()), kernel[grid](*args, **kwargs))

        patch.setattr(decode, "few_merge_kernel", Seen())
        flash.attention(*of.arguments, **of.options)
    logs = parts[0].view(3, 2, 3)
    assert bool(torch.isfinite(logs[0]).all())  # two tiles for each
    assert int(torch.isfinite(logs[1, 0]).sum()) == 1
    assert bool((logs[2] == -torch.inf).all())


def test_a_call_repeats_bit_for_bit() -> None:
    of = Attention(b=2, m=3, n=90, h=4, g=2, dtype="bfloat16", mask="causal()").inputs(DEVICE)
    first = flash.attention(*of.arguments, **of.options)
    for _ in range(3):
        again = flash.attention(*of.arguments, **of.options)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.parametrize("mask", ["causal()", "lengths([80, 3])"])
def test_a_repeated_call_reads_the_tensors_that_it_is_given(mask: str) -> None:
    for seed in range(5):
        assert_exact(Attention(b=2, m=2, n=90, h=4, g=2, dtype="bfloat16", mask=mask, sink=1.0, seed=seed))


@given(st.integers(1, 4096), st.integers(1, 600), st.integers(1, 500))
def test_a_split_count_is_legal_and_fills_the_machine_where_it_can(programs: int, places: int, most: int) -> None:
    splits = splits_for(programs, places, most)
    assert 1 <= splits <= max(1, most)
    if programs * most >= places:
        waves = programs * splits / places
        assert waves / -(-programs * splits // places) > 0.45


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"])
def test_every_problem_of_few_queries_has_a_choice(architecture: str) -> None:
    for heads, rows, keys, width, itemsize in ((8, 4, 8192, 128, 2), (2048, 128, 300, 256, 4), (1, 128, 10**6, 576, 2)):
        key = FewKey(
            architecture=architecture, processors=132, heads=heads, rows=rows, keys=keys, width=width, itemsize=itemsize
        )
        choice = choose_few(key)
        assert choice.tile_m >= 16
        assert choice.splits <= -(-keys // 16)


def test_many_queries_are_not_few() -> None:
    q, k = torch.zeros(1, 8, 64, 16), torch.zeros(1, 2, 4096, 16)
    assert not decode.few(q, k, k)
    assert decode.few(q[:, :, :1], k, k)
    assert decode.few(q[:, :, :7], k, k)
    assert flash.declines("attention", *(x.to(DEVICE).float() for x in (q, k, k)), mask=masks.causal()) is None
