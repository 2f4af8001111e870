"""How laws call a backend: arguments as the problem has them, watched; results of the right dtype, judged.

Shapes: as in `longspan.spec.attention`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import AttentionState

from .budget import Bound, worst
from .problems import Inputs

Device = torch.device | str
Result = TypeVar("Result")


def tensors(x: object) -> Iterator[Tensor]:
    """Find every tensor of an argument: in states, rotations and masks too."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from tensors(tuple(x.values()))
    elif isinstance(x, Sequence) and not isinstance(x, str):
        for part in x:
            yield from tensors(part)
    elif is_dataclass(x):
        yield from tensors([getattr(x, field.name) for field in fields(x)])


def watched(operation: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call an operation, and see that it writes to none of its arguments."""
    before = [(x, x._version, x.detach().clone()) for x in tensors((args, kwargs))]  # noqa: SLF001 - torch's own count
    result = operation(*args, **kwargs)
    for x, version, copy in before:
        assert x._version == version, f"an argument of shape {list(x.shape)} was written to"  # noqa: SLF001
        assert torch.equal(x.detach().nan_to_num(), copy.nan_to_num()), f"an argument of {list(x.shape)} changed"
    return result


def typed(state: AttentionState, of: torch.dtype, out_dtype: torch.dtype | None = None) -> AttentionState:
    """See that a state has the dtypes of its contract: out as asked or as q, lse float64 of float64, else float32."""
    expected = (out_dtype or of, torch.float64 if of == torch.float64 else torch.float32)
    assert (state.out.dtype, state.lse.dtype) == expected, f"dtypes are {state.out.dtype} and {state.lse.dtype}"
    return state


def compare(state: AttentionState, bound: dict[str, Bound]) -> float:
    """Compare out and lse with their bounds."""
    return max(worst("out", state.out, bound["out"]), worst("lse", state.lse, bound["lse"]))


def call(backend: Backend, of: Inputs, **changed: Any) -> AttentionState:
    """Call attention as the problem says."""
    options = {**of.options, **changed}
    return typed(watched(backend.attention, *of.arguments, **options), of.q.dtype, options["out_dtype"])


def leaves(of: dict[str, Tensor | None], trained: str) -> dict[str, Tensor]:
    """Ask a gradient of those arguments that are trained, and are there; of all of them where none would be left."""
    there = {name: x for name, x in of.items() if x is not None}
    wanted = [name for name in there if name[0] in trained] or list(there)
    return {name: there[name].detach().requires_grad_() for name in wanted}


def pull(outputs: Sequence[Tensor], inputs: dict[str, Tensor], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients by the names of their inputs: zero where nothing flows, in the dtype and shape of the input."""
    flows = [(x, d_x) for x, d_x in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if not flows:
        return {name: torch.zeros_like(x) for name, x in inputs.items()}
    found = torch.autograd.grad(
        [x for x, _ in flows], list(inputs.values()), [d_x for _, d_x in flows],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(inputs, found, strict=True))


def backward(backend: Backend, of: Inputs, *, through_lse: bool, **changed: Any) -> dict[str, Tensor]:
    """Run forward and backward; gradients by the names of their arguments."""
    given: dict[str, Tensor | None] = {"q": of.q, "k": of.k, "v": of.v, "sink": of.options["sink"]}
    trained = leaves(given, of.trained)
    given = {**given, **trained}
    options = {**of.options, "sink": given["sink"], **changed}
    state = watched(backend.attention, given["q"], given["k"], given["v"], **options)
    typed(state, of.q.dtype, options["out_dtype"])
    if not through_lse:
        return pull([state.out], trained, [of.d_out])
    return pull(state, trained, [of.d_out, of.d_lse])
