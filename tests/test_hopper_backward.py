"""The backward kernel of `hopper` alone: gradients from an exact forward pass, held to the budget on the GPU itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.backends.flash.lowering import lower
from longspan.laws import Attention, attention_bounds, worst
from longspan.spec.masks import Mask

hopper = pytest.importorskip("longspan.backends.hopper", exc_type=ImportError)
ON_HOPPER = hopper.unavailable() is None
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason=str(hopper.unavailable()))

PLAIN = [
    Attention(b=b, h=h, g=g, m=m, n=n, d=d, e=e, dtype=dtype, mask=mask, seed=m + n)
    for dtype, d, e in (
        ("bfloat16", 128, 128), ("float16", 64, 64), ("bfloat16", 64, 64), ("float16", 128, 128),
        ("bfloat16", 96, 96), ("bfloat16", 128, 64), ("float16", 64, 128), ("bfloat16", 32, 40),
    )
    for mask in ("everything()", "causal()")
    for b, h, g, m, n in ((1, 1, 1, 128, 128), (2, 4, 2, 333, 401), (1, 6, 1, 515, 130), (1, 2, 2, 1, 1000))
]  # fmt: skip
CASES: list[tuple[str, float, dict[str, Any]]] = [
    ("causal() & window(70)", float("nan"), {}),
    ("window(33, ahead=90)", float("nan"), {}),
    ("causal() & lengths([170, 0])", float("nan"), {}),
    ("lengths([299, 5]) & window(40)", float("nan"), {}),
    ("causal() & window(40, keep_first=20)", float("nan"), {}),
    ("documents([100, 1, 150], [90, 0, 200]) & causal()", float("nan"), {}),
    ("documents([100, 1, 150], [90, 0, 200]) & window(30, keep_first=3)", float("nan"), {}),
    ("prefix(77)", 0.0, {}), ("chunks(100) & causal()", 0.0, {}),
    ("causal()", 0.0, {"q_offset": 20}), ("causal()", 0.0, {"q_offset": (7, 290)}),
    ("causal()", 0.0, {"k_offset": 11}),
    ("causal()", 0.0, {"softcap": 5.0}), ("everything()", 0.0, {"softcap": 2.0, "scale": -0.4}),
    ("causal()", 0.0, {"sink": 3.0}), ("causal()", 0.0, {"alibi": 0.5}), ("everything()", 0.0, {"scale": -0.3}),
    ("documents([200, 90], [200, 90]) & causal()", 0.0, {"alibi": 0.1, "softcap": 9.0, "sink": 1.0}),
    ("causal()", 0.0, {"amplitude": 6.0}), ("causal()", 0.0, {"mean": 100.0}),
    ("causal()", 0.0, {"storage": "bmhd", "d_out_storage": "expand"}),
]  # fmt: skip
MASKED = [
    Attention(b=2, h=4, g=2, m=m, n=n, d=d, e=d, dtype="bfloat16", mask=mask, dead=dead, needle=True, seed=m, **more)
    for d, m, n in ((128, 300, 450), (64, 450, 300), (256, 300, 410))
    for mask, dead, more in CASES
]
WIDE = [
    Attention(b=b, h=h, g=g, m=m, n=n, d=d, e=e, dtype=dtype, mask=mask, seed=m + n)
    for dtype, d, e in (
        ("bfloat16", 256, 256), ("float16", 256, 256), ("bfloat16", 192, 128), ("float16", 256, 64),
        ("bfloat16", 64, 256), ("bfloat16", 160, 200),
    )
    for mask in ("everything()", "causal()")
    for b, h, g, m, n in ((2, 4, 2, 333, 401), (1, 6, 1, 515, 130))
]  # fmt: skip


def lowered(mask: Mask, b: int, m: int, n: int, options: dict[str, Any], device: torch.device) -> Any:
    """Lower the mask of a problem."""
    return lower(mask, b, m, n, q_offset=options["q_offset"], k_offset=options["k_offset"], device=device)


def worst_gradient(problem: Attention, *, deterministic: bool = False) -> float:
    """Compare all gradients of the kernel with their bounds: the largest error as a fraction of its budget."""
    from longspan.backends.hopper.backward import backward  # noqa: PLC0415 - Gluon is imported where it can run
    from longspan.backends.hopper.backward_choices import chosen  # noqa: PLC0415
    from longspan.backends.hopper.launch import Call  # noqa: PLC0415

    of = problem.inputs("cuda")
    options = of.options
    bound = attention_bounds(*of.arguments, **options, d_out=of.d_out, d_lse=of.d_lse)
    seen = lowered(options["mask"], problem.b, problem.m, problem.n, options, of.q.device)
    call = Call(
        options["sink"], options["alibi"], seen.rows, seen.sequences, tuple(seen.interval),
        problem.d**-0.5 if options["scale"] is None else options["scale"], options["softcap"], of.q.dtype,
        deterministic=deterministic,
    )  # fmt: skip
    found: tuple[Tensor, ...] = backward(
        call, *of.arguments, bound["out"].truth.to(of.q.dtype).contiguous(), bound["lse"].truth.float().contiguous(),
        of.d_out, of.d_lse, chosen(call, *of.arguments),
    )  # fmt: skip
    named: dict[str, Tensor] = dict(zip(("dq", "dk", "dv"), found[:3], strict=True))
    if options["sink"] is not None:
        named["dsink"] = found[3].sum(0)
    assert all(x.is_contiguous() for x in found)
    assert all(x.dtype == of.q.dtype for x in found[:3])
    return max(worst(name, x, bound[name]) for name, x in named.items())


@needs_hopper
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("problem", PLAIN + WIDE + MASKED, ids=repr)
def test_gradients_are_exact(problem: Attention, deterministic: bool) -> None:
    assert worst_gradient(problem, deterministic=deterministic) <= 1
