# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""`flash`'s rotation under `torch.func`, `torch.compile` and `torch.library`: transforms change no number."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from longspan import spec
from longspan.backends import flash
from longspan.spec import Rotation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))

ROTATION = Rotation(spec.inv_freq(8, device=DEVICE), 1.25)  # made outside: dynamo does not see through shape checks


def heads(h: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw heads [2, h, 6, 10], heads inside tokens."""
    return torch.randn(2, 6, h, 10, device=DEVICE).to(dtype).transpose(1, 2)


def positions() -> Tensor:
    """Draw positions [2, 6]."""
    return torch.randint(0, 2**31, (2, 6), device=DEVICE)


MAPS = {
    "heads": ((0, None, None), (3, 2, 4, 5, 14), (2, 5), (6,)),
    "heads, last": ((4, None, None), (3, 2, 4, 5, 14), (2, 5), (6,)),
    "heads and positions": ((0, 0, None), (3, 2, 4, 5, 14), (3, 2, 5), (6,)),
    "shared positions": ((0, 0, None), (3, 2, 4, 5, 14), (3, 5), (6,)),
    "positions": ((None, 0, None), (2, 4, 5, 14), (3, 2, 5), (6,)),
    "axes of positions": ((0, 1, None), (3, 2, 4, 5, 14), (2, 3, 2, 5), (6,)),
    "speeds": ((0, None, 0), (3, 2, 4, 5, 14), (2, 5), (3, 6)),
    "speeds of sequences": ((0, 0, 0), (3, 2, 4, 5, 14), (3, 2, 5), (3, 2, 6)),
    "one row of speeds": ((0, None, None), (3, 2, 4, 5, 14), (5,), (1, 6)),
}


@pytest.mark.parametrize("name", MAPS)
def test_mapping_is_a_loop(name: str) -> None:
    dims, *shapes = MAPS[name]
    x, position = torch.randn(shapes[0], device=DEVICE), torch.randint(0, 99, shapes[1], device=DEVICE)
    x = x if dims[0] is None else x.movedim(0, dims[0])
    inv_freq = torch.rand(shapes[2], dtype=torch.float64, device=DEVICE)
    axis = torch.arange(6, device=DEVICE) % 2

    def turn(rotate: Any, *of: Tensor) -> Tensor:
        return rotate(of[0], of[1], Rotation(of[2], 1.5, axis=axis))

    found = torch.vmap(lambda *of: turn(flash.rotate, *of), dims)(x, position, inv_freq)
    for i in range(3):
        of = [t if dim is None else t.select(dim, i) for t, dim in zip((x, position, inv_freq), dims, strict=True)]
        assert (found[i] - turn(spec.rotate, *of)).abs().max() < 1e-5


def test_transforms_compose() -> None:
    x, position = torch.randn(3, 2, 4, 5, 8, device=DEVICE), torch.randint(0, 99, (3, 5), device=DEVICE)

    def cube(rotate: Any) -> Tensor:
        loss = lambda x, position: (rotate(x, position, ROTATION) ** 3).sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss))(x, position)

    assert (cube(flash.rotate) - cube(spec.rotate)).abs().max() < 1e-4


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_is_one_graph_and_the_same_numbers(dynamic: bool) -> None:
    torch._dynamo.reset()  # noqa: SLF001
    q, k = heads(4, torch.bfloat16).requires_grad_(), heads(2, torch.bfloat16).contiguous().requires_grad_()
    position = positions()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        turned_q, turned_k = flash.rotate_qk(q, k, position, ROTATION)
        return (turned_q**2).sum() + (turned_k.float() ** 3).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    found = torch.autograd.grad(compiled(q, k), (q, k))
    for one, other in zip(found, torch.autograd.grad(loss(q, k), (q, k)), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_call_in_place_is_one_graph() -> None:
    q, k, position, counter = heads(4), heads(1), positions(), CompileCounter()
    expected = flash.rotate_qk(q, k, position, ROTATION)
    torch.compile(lambda q, k: flash.rotate_qk_(q, k, position, ROTATION), fullgraph=True, backend=counter)(q, k)
    assert counter.frame_count == 1
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def test_the_operators_tell_torch_the_truth_about_themselves() -> None:
    of = ([heads(4), heads(2)[..., 2:]], positions(), ROTATION.inv_freq, None, None, 1.25, True)
    torch.library.opcheck(torch.ops.longspan.flash_rotate.default, (*of, False))
    torch.library.opcheck(torch.ops.longspan.flash_rotate_.default, of)


def test_a_gradient_taken_inside_a_compiled_function_is_never_lost() -> None:
    torch._dynamo.reset()  # noqa: SLF001
    x, position = heads(2), positions()
    gradient = torch.func.grad(lambda x: (flash.rotate(x, position, ROTATION) ** 3).sum())
    with pytest.raises(RuntimeError, match="setup_context"):  # torch's words: it cannot look through the operator
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(x)


class Turn(torch.nn.Module):
    """A module that rotates, to export."""

    def forward(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate."""
        return flash.rotate_qk(q, k, position, ROTATION)


def test_an_exported_call_is_one_node_for_every_length() -> None:
    m = torch.export.Dim("m", min=2)
    exported = torch.export.export(
        Turn(), (heads(4), heads(2), positions()), dynamic_shapes={"q": {2: m}, "k": {2: m}, "position": {1: m}}
    )
    calls = [node.target for node in exported.graph.nodes if "flash_rotate" in str(node.target)]
    assert calls == [torch.ops.longspan.flash_rotate.default]
    q, k, position = (torch.cat([x, x[:, :, :3]], 2) for x in (heads(4), heads(2), positions()[:, None]))
    for found, eager in zip(
        exported.module()(q, k, position[:, 0]), flash.rotate_qk(q, k, position[:, 0], ROTATION), strict=True
    ):
        assert torch.equal(found, eager)
