"""What the partitions of `hopper`'s eight-bit kernel tell each other: no run hangs, and each result is attention."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

import gluon_threads
import pytest
import torch
from gluon_threads import Barrier, Machine, Memory, Pointer, box, interpreted
from torch import Tensor

from longspan import spec
from longspan.laws import worst
from longspan.laws.quantised import quantised_bounds
from longspan.spec import masks, quantise

forward = pytest.importorskip("longspan.backends.hopper.fp8_forward", exc_type=ImportError)
kernels = pytest.importorskip("longspan.backends.hopper.fp8_kernel", exc_type=ImportError)
tiles = pytest.importorskip("longspan.backends.hopper.tiles", exc_type=ImportError)
values = pytest.importorskip("longspan.backends.hopper.values", exc_type=ImportError)
lowering = pytest.importorskip("longspan.backends.flash.lowering", exc_type=ImportError)

CASES = [
    (96, 128, "everything()"), (65, 170, "causal()"), (170, 65, "causal()"), (1, 200, "causal()"),
    (130, 130, "causal() & window(40)"), (130, 250, "window(30, ahead=50)"), (257, 257, "causal() & window(1)"),
]  # fmt: skip


class Bytes(Memory):
    """A described tensor of e4m3 numbers, held in float32; what cannot be seen of a tile is zeros."""


def load_bytes(source: Memory, coordinates: list[int], barrier: Barrier, tile: Memory) -> None:
    """Copy a tile in; a number is a byte."""
    part, where = box(source.data, [int(c) for c in coordinates], tuple(tile.data.shape))
    tile.data.zero_()
    tile.data[where] = part
    barrier.add(0, -tile.data.numel())


def rounded(x: Tensor) -> Tensor:
    """Round to e4m3, and keep float32, which more operators know."""
    return x.to(torch.float8_e4m3fn).float()


def attend(
    case: tuple[int, int, str], warpgroups: int, parts: int, staged: bool, patch: pytest.MonkeyPatch, **instead: Any
) -> None:
    """Run the kernel, with functions of its module replaced, and hold what it returns to the budget."""
    m, n, source = case
    b, h, g, d, programs = 2, 2, 1, 64, 3
    torch.manual_seed(m * n)
    mask: Any = eval(source, {**vars(masks)})  # noqa: S307 - our own source
    q, k, v = torch.randn(b, h, m, d), torch.randn(b, g, n, d), torch.randn(b, g, n, d) + 1
    unseen = ~spec.visible(spec.bounds(mask, b, m, n), n).any(1)[:, None, :, None]
    made = [quantise(x) for x in (q, k, v)]
    laid = values.laid_out(made[2])
    k8, v8 = made[1].values.float().masked_fill(unseen, float("nan")), laid.values.float()
    dead = values.laid_out(quantise(unseen.float().expand_as(v))).values.float() > 0
    v8 = v8.masked_fill(dead, float("nan"))
    seen = lowering.lower(mask, b, m, n, q_offset=None, k_offset=0, device=q.device)
    form = forward.variant(seen, m, n, d, d, torch.float32)
    form = replace(
        form, W=warpgroups, M=16, N=32, D=d, E=d, STAGES=2, PARTS=parts, STAGED=staged,
        MASKED=source != "everything()" or n % 32 != 0,
    )  # fmt: skip
    count = -(-m // (form.W * form.M))
    out, lse = torch.full((b, h, m, d), 99.0), torch.full((b, h, m), 99.0)
    counter = torch.zeros(1, dtype=torch.int32)
    flat = [Pointer(x.scale) for x in made]
    machine = Machine(programs)
    language = gluon_threads.language

    def widened(machine: Machine) -> SimpleNamespace:
        """The language, with what eight bits need: rounding, and axes in another order."""
        given = language(machine)
        return SimpleNamespace(**{**vars(given), "float8e4nv": None, "permute": torch.permute})

    patch.setattr(gluon_threads, "language", widened)
    for name in ("LOG2_E", "forward_kernel"):
        patch.setattr(kernels, name, kernels.fp8_kernel, raising=False)
    patch.setattr(Memory, "slice", sliced)
    with interpreted(kernels, tiles, machine) as kernel:
        patch.setattr(kernels, "load_tile", load_bytes)
        patch.setattr(kernels, "operand", lambda p, form: permuted(rounded(p), form))
        patch.setattr(kernels, "OFFSET", 8.0)
        patch.setattr(kernels, "LOWEST", torch.finfo(torch.float32).min)
        patch.setattr(kernels, "LEAST", torch.tensor(1e-37))
        for name, function in instead.items():
            patch.setattr(kernels, name, function)
        for program in range(programs):
            machine.program = program
            kernel(
                Bytes(made[0].values.float()), Bytes(k8), Bytes(v8), Memory(out.view(b * h, m, d)), Pointer(out),
                Pointer(lse), *flat, Pointer(counter), count * b * h, count, h, h // g, m, b, d,
                seen.low, seen.high, seen.stop, 0.125 * forward.LOG2_E, C=form,
            )  # fmt: skip
    made[1:] = [x._replace(values=zeroed(x.values, unseen)) for x in made[1:]]
    bound = quantised_bounds(*made, mask=mask, out_dtype=torch.float32)
    assert worst("out", out, bound["out"]) <= 1
    assert worst("lse", lse, bound["lse"]) <= 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]} {case[0]} {case[1]}")
@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("staged", [True, False])
def test_partitions_agree(
    case: tuple[int, int, str], warpgroups: int, parts: int, staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend(case, warpgroups, parts, staged, monkeypatch)


BUGS: Final[dict[str, tuple[tuple[int, int, str], dict[str, Any], str]]] = {
    "tiles of others are not let pass": ((170, 65, "causal()"), {"skip": lambda it, count, *_: it + count}, "barrier"),
    "weights at the places of their keys": (CASES[0], {"operand": lambda p, _: rounded(p)}, "out exceeds budget"),
    "dead values stay": (CASES[5], {"clean": lambda *_: None}, "out exceeds budget"),
    "rows begin without a peak": (CASES[2], {"LOWEST": -torch.inf}, "out exceeds budget"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, instead, message = BUGS[bug]
    monkeypatch.setattr(gluon_threads, "PATIENCE", 0.5)
    with pytest.raises(AssertionError, match=message):
        attend(case, 2, 1, False, monkeypatch, **instead)


def sliced(memory: Memory, start: int, length: int, axis: int = 0) -> Memory:
    """Some rows, or columns."""
    return Memory(memory.data.narrow(axis, start, length))


def permuted(weight: Tensor, C: Any) -> Tensor:  # noqa: N803 - named as in the kernel
    """Put weights at the places of the values that they belong to, as `fp8_kernel.operand`."""
    return weight.reshape(C.M, C.N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(C.M, C.N)


def zeroed(x: Tensor, where: Tensor) -> Tensor:
    """Zero some e4m3 numbers."""
    return x.view(torch.uint8).masked_fill(where, 0).view(torch.float8_e4m3fn)
