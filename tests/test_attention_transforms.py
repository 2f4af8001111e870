"""Attention of `flash` and `hopper` under autograd, `torch.func`, `torch.compile` and `torch.export`."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import backends
from longspan.backends import Unsupported
from longspan.spec import masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What each is held to in: `hopper` serves half precision.
DTYPES = {"flash": torch.float32, "hopper": torch.bfloat16}
MISSING = {}
for _name in DTYPES:
    try:
        backends.load(_name)
    except Unsupported as reason:
        MISSING[_name] = str(reason)
each = [
    pytest.param(name, marks=[pytest.mark.skipif(name in MISSING, reason=MISSING.get(name, ""))]) for name in DTYPES
]
on_each = pytest.mark.parametrize("name", each)


def arguments(name: str) -> list[Tensor]:
    """Draw q, k and v."""
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, tokens, 16, generator=draw).to(DEVICE, DTYPES[name]).requires_grad_()
        for h, tokens in ((4, 9), (2, 11), (2, 11))
    ]


def energy_of(name: str) -> Any:
    """Make a function from q, k, v and sinks to a number that depends on out and on lse."""
    backend: Any = backends.load(name)

    def energy(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        mask = masks.causal() & masks.lengths([10, 7])
        state = backend.attention(q, k, v, mask=mask, sink=sink, out_dtype=torch.float32, deterministic=True)
        return (state.out * state.out).sum() + state.lse.sum()

    return energy


@on_each
def test_the_second_derivative_is_refused_by_name(name: str) -> None:
    q, k, v = arguments(name)
    backend: Any = backends.load(name)
    (dq,) = torch.autograd.grad(backend.attention(q, k, v).out.sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match=f"{name}.attention has no second derivative"):
        dq.sum().backward()


@on_each
def test_a_functional_gradient_is_the_plain_one(name: str) -> None:
    inputs = (*arguments(name), torch.ones(4, device=DEVICE, requires_grad=True))
    energy = energy_of(name)
    expected = torch.autograd.grad(energy(*inputs), inputs)
    for x, y in zip(torch.func.grad(energy, argnums=(0, 1, 2, 3))(*inputs), expected, strict=True):
        assert torch.equal(x, y)


# In a process of its own, since no compiler looks through the checks of shapes that this suite adds to the spec.
COMPILED = """
import sys
import torch
from longspan import backends
from longspan.spec import masks
backend, device = backends.load(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float32 if sys.argv[1] == "flash" else torch.bfloat16
draw = torch.Generator().manual_seed(0)
shapes = ((2, 4, 9, 16), (2, 2, 11, 16), (2, 2, 11, 16))
inputs = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]
inputs.append(torch.randn(4, generator=draw).to(device).requires_grad_())
lengths = torch.tensor([10, 7], device=device)
def energy(q, k, v, sink):
    options = {"out_dtype": torch.float32, "deterministic": True}
    state = backend.attention(q, k, v, mask=masks.causal() & masks.lengths(lengths), sink=sink, **options)
    packed = backend.attention(q, k, v, mask=masks.documents([4, 5], [5, 6]) & masks.window(3), **options)
    return (state.out * state.out).sum() + state.lse.sum() + packed.out.sum()
expected = torch.autograd.grad(energy(*inputs), inputs)
compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
functional = torch.compile(torch.func.grad(energy, argnums=(0, 1, 2, 3)), fullgraph=True, backend="aot_eager")
for found in (torch.autograd.grad(compiled(*inputs), inputs), functional(*inputs)):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
print("equal")
"""


EXPORTED = """
import sys
import torch
from longspan import backends
from longspan.spec import masks
backend, device = backends.load(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float32 if sys.argv[1] == "flash" else torch.bfloat16
class Attending(torch.nn.Module):
    def forward(self, q, k, v):
        state = backend.attention(q, k, v, mask=masks.causal() & masks.window(9))
        return state.out, state.lse
def heads(tokens):
    draw = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, count, tokens, 16, generator=draw).to(device, dtype) for count in (4, 2, 2)]
tokens = torch.export.Dim("tokens", min=40, max=4096)
exported = torch.export.export(Attending(), tuple(heads(48)), dynamic_shapes={x: {2: tokens} for x in "qkv"})
assert sum(f"{sys.argv[1]}_attention" in str(node.target) for node in exported.graph.nodes) == 1
for length in (48, 71, 300):
    for x, y in zip(exported.module()(*heads(length)), Attending()(*heads(length)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
print("equal")
"""


@pytest.mark.parametrize("source", [COMPILED, EXPORTED], ids=["compiled", "exported for every length"])
@on_each
def test_a_captured_graph_holds_the_operators_and_has_the_plain_results(source: str, name: str) -> None:
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", source, name], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.stdout.strip() == "equal", child.stderr[-3000:]


@pytest.mark.parametrize("dims", [(0, 2, None, 0), (3, None, 1, None)])
@on_each
def test_mapping_is_stacking(dims: tuple[int | None, ...], name: str) -> None:
    inputs = [*(x.detach() for x in arguments(name)), torch.ones(4, device=DEVICE)]
    wide = [x if dim is None else torch.stack([x, 1 - 2 * x], dim=dim) for x, dim in zip(inputs, dims, strict=True)]
    gradient = torch.func.grad(energy_of(name), argnums=(0, 1, 2, 3))
    found = torch.func.vmap(gradient, in_dims=dims)(*wide)
    for i in range(2):
        one = [x if dim is None else x.select(dim, i).contiguous() for x, dim in zip(wide, dims, strict=True)]
        for x, y in zip(found, gradient(*one), strict=True):
            assert torch.equal(x[i], y)


@pytest.mark.parametrize("b", [1, 2])
@on_each
def test_mapping_over_cotangents_is_one_after_the_other(b: int, name: str) -> None:
    inputs = [x.detach()[:b] for x in arguments(name)]
    backend: Any = backends.load(name)

    def out(*heads: Tensor) -> Tensor:
        return backend.attention(*heads, mask=masks.causal(), deterministic=True).out

    primal, pull, *_ = torch.func.vjp(out, *inputs)
    cotangents = torch.randn(3, *primal.shape, generator=torch.Generator().manual_seed(1)).to(primal)
    found = torch.func.vmap(pull)(cotangents)
    for i, cotangent in enumerate(cotangents):
        for x, y in zip(found, pull(cotangent), strict=True):
            torch.testing.assert_close(x[i], y)


@on_each
def test_the_operators_keep_what_they_promise_to_the_compiler(name: str) -> None:
    q, k, v = (x.detach() for x in arguments(name))
    more = (True,) if name == "hopper" else ()  # deterministic
    rest = (q, k, v, torch.ones(4, device=DEVICE), None, None, None, [-9, 11, 11, 2, 0], 0.25, None, torch.float32)
    operator = getattr(torch.ops.longspan, f"{name}_attention")
    out, lse = operator(*rest, *more)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*rest, *more), test_utils=checks)
    back = getattr(torch.ops.longspan, f"{name}_attention_backward")
    torch.library.opcheck(back, (torch.ones_like(out), None, out, lse, *rest, *more), test_utils=checks)
