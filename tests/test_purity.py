"""The specification computes and does not act: read from its source, and seen at run time.

Shapes here: 2 sequences, 4 query heads on 2 key heads, 3 queries, 5 keys, head dimension 8.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import spec

FILES = sorted(Path(spec.__file__).parent.rglob("*.py"))

# Movement is einops', which names its axes.
MOVES = {"view", "permute", "transpose", "swapaxes", "swapdims", "movedim", "t", "T", "mT", "H", "mH", "as_strided"}
MEMORY = {"cache", "lru_cache", "cached_property", "no_grad", "enable_grad", "set_grad_enabled", "inference_mode"}
CHANCE = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "manual_seed", "dropout"}


def offences(source: str) -> list[str]:
    """List what in a file acts: changes an argument, remembers, or depends on more than its arguments."""
    return [
        f"line {getattr(node, 'lineno', '?')}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if acts(node)
    ]


def acts(node: ast.AST) -> bool:  # noqa: PLR0911 - one line a kind of act
    """Whether a syntax node acts rather than computes."""
    match node:
        case ast.AugAssign() | ast.Global() | ast.Nonlocal() | ast.Delete():
            return True
        case ast.Assign(targets=targets):
            return any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets)
        case ast.FunctionDef(decorator_list=[_, *_]) | ast.AsyncFunctionDef():
            return True
        case ast.Attribute(attr=name):
            in_place = name.endswith("_") and not name.endswith("__")
            return in_place or name in MOVES | MEMORY | CHANCE
        case ast.ImportFrom(names=names):
            return any(alias.name in MEMORY | CHANCE for alias in names)
        case ast.keyword(arg="out"):
            return True
        case _:
            return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(FILES[0].parent).as_posix())
def test_a_file_of_the_specification_is_pure(file: Path) -> None:
    assert offences(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "x += 1",
        "x[0] = 1",
        "x.grad = None",
        "del x[0]",
        "def f():\n    global x",
        "def f():\n    def g():\n        nonlocal x",
        "@decorated\ndef f(): ...",
        "from functools import lru_cache",
        "f = functools.cache(g)",
        "x.masked_fill_(hidden, 0)",
        "torch.add(x, y, out=z)",
        "x.view(2, 3)",
        "x.T",
        "torch.rand(2)",
        "with torch.no_grad(): ...",
    ],
)
def test_an_act_is_seen(source: str) -> None:
    assert len(offences(source)) == 1


@pytest.mark.parametrize("source", ["x = x + 1", "y = x.__class__", "@dataclass\nclass C: ...", "x.masked_fill(m, 0)"])
def test_a_computation_is_no_offence(source: str) -> None:
    assert offences(source) == []


def normal(*shape: int) -> Tensor:
    """Draw numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


Q, K, V, SINK = normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8), normal(4)
FLAT_Q, FLAT_K, FLAT_V = normal(6, 4, 8), normal(10, 2, 8), normal(10, 2, 8)  # two sequences, one after the other
PAGES = normal(4, 2, 4, 8)
POSITION, LENGTHS, SLOT = torch.arange(5), torch.tensor([5, 3]), torch.tensor([0, -1, 7])
COUNTS = torch.tensor([2, 4])
OLD, NEW = spec.scaling.none(8), spec.scaling.yarn(8, factor=4, original=16)
MASK = spec.masks.causal() & spec.masks.window(3) & spec.masks.lengths(LENGTHS)
STATE = spec.AttentionState(normal(2, 4, 3, 8), normal(2, 4, 3))
QUANTISED = [spec.quantise(x, block=2) for x in (Q, K, V)]
EXTRAS = {"sink": SINK, "alibi": SINK.abs(), "softcap": 5.0}

# One call of every function of the specification that takes tensors, each with everything optional that is a tensor.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "add_sink": ((STATE, SINK), {}),
    "angle": ((POSITION, OLD), {}),
    "angle_of_turns": ((POSITION, spec.turns(OLD.inv_freq)), {}),
    "append": ((PAGES[0, :, :3].movedim(1, 0), PAGES[1, :, :3].movedim(1, 0), PAGES, PAGES, SLOT),
               {"position": POSITION[:3], "rotation": NEW}),
    "attention": ((Q, K, V), {"mask": MASK, "q_offset": LENGTHS, **EXTRAS}),
    "attention_paged": ((FLAT_Q, COUNTS, PAGES, PAGES, torch.tensor([[0, 3], [2, -1]]), torch.tensor([6, 4])), EXTRAS),
    "attention_quantised": (tuple(QUANTISED), {"mask": MASK, "q_offset": LENGTHS, **EXTRAS}),
    "attention_tiled": ((Q, K, V), {"mask": MASK, "tile_m": 2, "tile_n": 2, **EXTRAS}),
    "attention_varlen": ((FLAT_Q, FLAT_K, FLAT_V, COUNTS, torch.tensor([3, 7])), EXTRAS),
    "bounds": ((spec.masks.documents(LENGTHS, LENGTHS), 2, 8, 8), {}),
    "dequantise": ((QUANTISED[0],), {}),
    "hadamard": ((Q, spec.random_signs(8, 0)), {}),
    "merge": ((STATE, STATE), {}),
    "quantise": ((K,), {"block": 2}),
    "rerotate": ((K, POSITION, OLD, NEW), {}),
    "rotate": ((K, POSITION, NEW), {"pairing": "interleaved"}),
    "rotate_qk": ((Q, K[:, :, :3], POSITION[:3], NEW), {}),
    "turns": ((OLD.inv_freq,), {}),
    "visible": ((spec.bounds(MASK, 2, 3, 5), 5), {}),
}  # fmt: skip


def tensors(value: object) -> Iterator[Tensor]:
    """Find every tensor in arguments or results, in the order in which it is met."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in fields(value)])


def takes_tensors(function: Callable[..., Any]) -> bool:
    """Whether a parameter of the function is a tensor, or is made of them."""
    annotations = str([parameter.annotation for parameter in inspect.signature(function).parameters.values()])
    return any(word in annotations for word in ("Tensor", "Rotation", "AttentionState", "Bounds", "Mask", "Quantised"))


def test_every_function_that_takes_tensors_is_called_here() -> None:
    functions = {name: getattr(spec, name) for name in spec.__all__}
    assert set(CALLS) == {name for name, f in functions.items() if inspect.isfunction(f) and takes_tensors(f)}


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_changes(name: str) -> None:
    args, kwargs = CALLS[name]
    given = list(tensors((args, kwargs)))
    before = [(x._version, x.clone()) for x in given]  # noqa: SLF001 - the only count of writes there is
    getattr(spec, name)(*args, **kwargs)
    assert [x._version for x in given] == [count for count, _ in before]  # noqa: SLF001
    assert all(torch.equal(x, copy) for x, (_, copy) in zip(given, before, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_has_the_same_result(name: str) -> None:
    args, kwargs = CALLS[name]
    one, two = (list(tensors(getattr(spec, name)(*args, **kwargs))) for _ in range(2))
    assert len(one) > 0
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
