"""What the partitions of `hopper`'s forward kernel tell each other: no run hangs, and each result is attention."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gluon_threads import Machine, Memory, Pointer, interpreted

from longspan import spec
from longspan.spec import masks

forward = pytest.importorskip("longspan.backends.hopper.forward", exc_type=ImportError)
kernels = pytest.importorskip("longspan.backends.hopper.forward_kernel", exc_type=ImportError)
tiles = pytest.importorskip("longspan.backends.hopper.tiles", exc_type=ImportError)
spans = pytest.importorskip("longspan.backends.hopper.spans", exc_type=ImportError)
launch = pytest.importorskip("longspan.backends.hopper.launch", exc_type=ImportError)
lowering = pytest.importorskip("longspan.backends.flash.lowering", exc_type=ImportError)

CASES: list[tuple[int, int, str, dict[str, Any]]] = [
    (96, 128, "everything()", {}), (65, 170, "causal()", {}), (170, 65, "causal()", {}), (1, 200, "causal()", {}),
    (130, 130, "causal() & window(40)", {"sink": True}), (130, 250, "window(30, ahead=50)", {"softcap": 5.0}),
    (100, 100, "lengths([70, 0]) & causal()", {}), (100, 130, "documents([30, 50], [40, 80]) & causal()", {}),
    (130, 160, "causal() & window(20, keep_first=9)", {"alibi": True}), (90, 90, "chunks(37) & causal()", {}),
    (40, 100, "causal() & window(8, keep_first=30)", {"k_offset": 75}),  # the head lies before the keys given
    (128, 300, "documents([64, 64], [256, 1000]) & causal() & window(16, keep_first=4)", {}),  # and behind some rows
    (90, 70, "causal()", {"alibi": True, "q_offset": [5, -40]}),
    (70, 70, "causal()", {"scale": -0.3}), (70, 70, "everything()", {"scale": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]} {case[0]} {case[1]}")
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize(("staged", "held"), [(True, False), (False, True)])
def test_partitions_agree(
    case: tuple[int, int, str, dict[str, Any]], warpgroups: int, staged: bool, held: bool
) -> None:
    m, n, source, options = case
    b, h, g, d, programs = 2, 2, 1, 64, 3
    torch.manual_seed(m * n)
    mask: Any = eval(source, {**vars(masks)})  # noqa: S307 - our own source
    q, k, v = torch.randn(b, h, m, d), torch.randn(b, g, n, d), torch.randn(b, g, n, d)
    k_offset = options.get("k_offset", 0)
    q_offset = torch.tensor(options["q_offset"], dtype=torch.int32) if "q_offset" in options else None
    unseen = ~spec.visible(spec.bounds(mask, b, m, n, q_offset=q_offset, k_offset=k_offset), n).any(1)
    k, v = (x.masked_fill(unseen[:, None, :, None], float("nan")) for x in (k, v))
    sink = torch.randn(h) if options.get("sink") else None
    alibi = torch.tensor([0.5, 0.1]) if options.get("alibi") else None
    scale, softcap = options.get("scale", 0.125), options.get("softcap")
    seen = lowering.lower(mask, b, m, n, q_offset=q_offset, k_offset=k_offset, device=q.device)
    call = launch.Call(sink, alibi, seen.rows, seen.sequences, tuple(seen.interval), scale, softcap, torch.float32)
    form = forward.variant(call, q, k, v)
    everything = form.MASK == "none" or (source == "everything()" and n % 32 == 0)
    form = replace(
        form, W=warpgroups, M=16, N=32, ONCE=False, D=d, E=d, STAGES=2, STAGED=staged, REUSE=False,
        HELD=held, OVERLAP=held,
        MASK="none" if everything else form.MASK if form.MASK != "none" else "affine",
    )  # fmt: skip
    count = -(-m // (form.W * form.M))
    out, lse = torch.full((b, h, m, d), 99.0), torch.full((b, h, m), 99.0)
    counter = torch.zeros(1, dtype=torch.int32)
    with launch.flash.quiet():
        plan = counter if call.rows is None else spans.spans(call, m, n, form.W, form.M, form.N)[0]
    flat = [lse if x is None else x for x in (sink, alibi, call.rows, call.sequences)]
    machine = Machine(programs)
    with interpreted(kernels, tiles, machine) as kernel:
        for program in range(programs):
            machine.program = program
            kernel(
                Memory(q), Memory(k), Memory(v), Memory(out.view(b * h, m, d)), Pointer(out), Pointer(lse),
                *map(Pointer, flat), Pointer(plan), Pointer(counter), count * b * h, count, h, h // g, m, b, d,
                *call.interval, int(sink is not None), int(alibi is not None), 0, 0, *forward.factors_of(call, form),
                C=form,
            )  # fmt: skip
    truth = spec.attention(
        q.double(), k.double(), v.double(), mask=mask, scale=scale, softcap=softcap,
        q_offset=q_offset, k_offset=k_offset,
        sink=None if sink is None else sink.double(), alibi=None if alibi is None else alibi.double(),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), truth.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), truth.lse, rtol=1e-5, atol=1e-5)
