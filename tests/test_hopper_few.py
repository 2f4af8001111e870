"""Few queries and pages in `hopper`: which kernels serve, what is served, and that gradients come from either kind."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longspan import backends, spec
from longspan.backends.flash import attending
from longspan.backends.flash.lowering import lower
from longspan.laws import Attention, attention_bounds, worst
from longspan.spec import masks

hopper: Any = pytest.importorskip("longspan.backends.hopper", exc_type=ImportError)
attention: Any = pytest.importorskip("longspan.backends.hopper.attention", exc_type=ImportError)
function: Any = pytest.importorskip("longspan.backends.hopper.function", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_HOPPER = hopper.unavailable() is None
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason=str(hopper.unavailable()))


def heads(h: int, tokens: int, d: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Draw heads."""
    return torch.randn(2, h, tokens, d, device=DEVICE).to(dtype)


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that 16 bytes do not divide."""
    room = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return room.copy_(x)


def lowered(q: Tensor, k: Tensor, options: dict[str, Any], *, deterministic: bool) -> tuple[Any, ...]:
    """What the operators take beside q, k and v."""
    sink, alibi, q_offset, k_offset = (options.get(x) for x in ("sink", "alibi", "q_offset", "k_offset"))
    seen = lower(options["mask"], 2, q.shape[2], k.shape[2], q_offset=q_offset, k_offset=k_offset or 0, device=q.device)
    numbers = attending.numbers(q, *(options.get(x) for x in ("scale", "softcap", "out_dtype")))
    return sink, alibi, seen.rows, seen.sequences, tuple(seen.interval), *numbers, deterministic


def declined(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Ask about heads alone, wherever they lie."""
    return attention.declines_heads(q, k, v, None)


def test_few_queries_may_lie_anywhere_and_be_wide() -> None:
    few, many, k = heads(2, 3), heads(2, 300), heads(2, 700)
    assert declined(few, k, k) is None
    assert declined(few, shifted(k), k) is None
    assert "16 bytes; k is not" in str(declined(many, shifted(k), k))
    assert "last stride is 1" in str(declined(few, k.transpose(2, 3).contiguous().transpose(2, 3), k))
    q, latent = heads(2, 3, 576), heads(2, 700, 576)
    assert declined(q, latent, latent[..., :512]) is None
    assert "up to 256, got 576 of q" in str(declined(q.requires_grad_(), latent, latent[..., :512]))
    assert "up to 256, got 576 of q" in str(declined(heads(2, 300, 576), latent, latent[..., :512]))


@pytest.mark.parametrize("learns", [False, True])
def test_what_has_an_output_has_a_gradient(learns: bool) -> None:
    with FakeTensorMode():
        q, k = (torch.empty(2, h, 300, 64, dtype=torch.float16, device="cuda", requires_grad=learns) for h in (4, 2))
        alibi = torch.empty(4, device="cuda")
        for mask in (masks.causal(), masks.causal() & masks.window(30, keep_first=2), masks.documents([100, 200])):
            options: dict[str, Any] = {"mask": mask, "softcap": 9.0, "sink": alibi, "alibi": alibi}
            assert attention.declines_attention(q, k, k, **options, deterministic=True) is None
        reason = attention.declines_attention(q, k, k, alibi=alibi.requires_grad_())
        assert "no gradient for alibi" in str(reason)
        wide = torch.empty_like(q, dtype=torch.float32)
        assert "serves fp16 and bf16" in str(attention.declines_attention(wide, wide, wide))


@pytest.mark.parametrize("lie", [lambda x: x, shifted], ids=["aligned", "shifted"])
@pytest.mark.parametrize(
    "mask", ["causal()", "causal() & lengths([70, 3])", "window(30) & documents([1, 2], [20, 80])"]
)
def test_few_queries_are_attended_from_by_the_kernel_that_splits_keys(lie: Any, mask: str) -> None:
    of = Attention(b=2, h=4, g=2, m=3, n=100, d=64, e=64, dtype="float16", mask=mask, sink=0.5).inputs(DEVICE)
    q, k, v = map(lie, of.arguments)
    assert function.decode.few(q, k, v)
    rest = lowered(q, k, of.options, deterministic=False)
    out, lse = function.launch_forward(q, k, v, *rest)
    bound = attention_bounds(*of.arguments, **of.options)
    assert max(worst("out", out, bound["out"]), worst("lse", lse, bound["lse"])) <= 1


def test_gradients_where_the_copy_engine_cannot_go() -> None:
    of = Attention(b=2, h=4, g=2, m=3, n=100, d=64, e=64, dtype="float16", mask="causal()", sink=0.5).inputs(DEVICE)
    q, k, v = map(shifted, of.arguments)
    rest = lowered(q, k, of.options, deterministic=True)
    out, lse = function.launch_forward(q, k, v, *rest)
    *found, d_sink = function.launch_backward(of.d_out, of.d_lse, out, lse, q, k, v, *rest)
    bound = attention_bounds(*of.arguments, **of.options, d_out=of.d_out, d_lse=of.d_lse)
    named = dict(zip(("dq", "dk", "dv", "dsink"), (*found, d_sink.sum(0)), strict=True))
    assert max(worst(name, x, bound[name]) for name, x in named.items()) <= 1


def test_pages_of_float32_are_declined_before_they_are_read() -> None:
    pool, counts = heads(2, 16, dtype=torch.float32), torch.tensor([3, 1], device=DEVICE)
    given = pool[0, :, :4].transpose(0, 1), counts, pool, pool, counts.int()[:, None] * 0, counts
    assert "serves fp16 and bf16" in str(hopper.declines("attention_paged", *given))
    with pytest.raises(backends.Unsupported, match="serves fp16 and bf16"):
        hopper.attention_paged(*given)
    half = [x.half() if x.is_floating_point() else x for x in given]
    assert hopper.declines("attention_paged", *half) is None
    found, truth = (
        hopper.attention_paged(*half),
        spec.attention_paged(*(x.double() if x.is_floating_point() else x for x in half)),
    )
    torch.testing.assert_close(found.out.double(), truth.out, rtol=2e-3, atol=2e-3)


@needs_hopper
@pytest.mark.parametrize("lie", [lambda x: x, shifted], ids=["aligned", "shifted"])
@pytest.mark.parametrize("m", [1, 16, 32])
def test_few_queries_of_a_long_cache_on_the_gpu(lie: Any, m: int) -> None:
    of = Attention(b=2, h=8, g=2, m=m, n=3000, d=128, e=128, dtype="bfloat16", mask="causal()", sink=0.5).inputs(DEVICE)
    leaves = [lie(x).requires_grad_() for x in of.arguments]
    assert hopper.declines("attention", *leaves, mask=masks.causal()) is None
    state = hopper.attention(*leaves, **of.options)
    found = torch.autograd.grad([state.out, state.lse], leaves, [of.d_out, of.d_lse])
    bound = attention_bounds(*of.arguments, **of.options, d_out=of.d_out, d_lse=of.d_lse)
    named = dict(zip(("out", "lse", "dq", "dk", "dv"), (state.out, state.lse, *found), strict=True))
    assert max(worst(name, x, bound[name]) for name, x in named.items()) <= 1
