"""Identity of a kernel's code: what it computes, and not where or how prettily it is written.

A digest covers the syntax tree of each function, of every function that it uses, and the values of the globals that it
reads; line numbers, comments, docstrings, decorators and formatting do not count, nor does the version of Python. What
belongs to Triton itself does not either: the version of that is recorded beside the digest.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Final

SKIPPED: Final = {"ctx", "kind", "type_comment", "type_params"}  # spelled differently by versions of Python
FOREIGN: Final = ("triton", "torch", "numpy", "builtins", "math", "typing")


def digest(functions: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits that change when what the functions compute may have changed."""
    seen: dict[str, str] = {}
    for function in functions:
        visit(function, seen)
    text = "\n".join(f"{name} = {seen[name]}" for name in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def visit(function: Any, seen: dict[str, str]) -> None:
    """Add a function, and whatever it uses, under qualified names."""
    plain = written(function)
    name = f"{plain.__module__}.{plain.__qualname__}"
    if name in seen:
        return
    seen[name] = ""  # a function may call itself
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(plain))).body[0]
    tree.decorator_list = []  # how it is compiled and launched, and not what it computes
    seen[name] = normal(tree)
    for used, value in globals_of(plain, tree):
        if isinstance(value, int | float | str | bool | tuple | None):
            seen[f"{name}:{used}"] = repr(value)
        elif hasattr(value, "value") and type(value).__name__ == "constexpr":
            seen[f"{name}:{used}"] = repr(value.value)
        elif own(value):
            visit(value, seen)


def written(function: Any) -> Any:
    """Find the Python function in what a decorator has made of it."""
    while not inspect.isfunction(function):
        inner = getattr(function, "fn", None) or getattr(function, "__wrapped__", None)
        if inner is None:
            msg = f"a source must be a function, or hold one as fn, got {function!r}"
            raise TypeError(msg)
        function = inner
    return function


def own(value: Any) -> bool:
    """Whether a global is a function of the project, and not of a library."""
    if isinstance(value, type | ModuleType) or not (inspect.isfunction(value) or hasattr(value, "fn")):
        return False
    return written(value).__module__.partition(".")[0] not in FOREIGN


def globals_of(function: Any, tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """Yield what a function reads from outside, one attribute deep into modules."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    scope = {**function.__globals__, **{name: cell.cell_contents for name, cell in cells}}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in scope and not isinstance(scope[node.id], ModuleType):
            yield node.id, scope[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            if isinstance(module, ModuleType) and module.__name__.partition(".")[0] not in FOREIGN:
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)


def normal(node: Any) -> str:
    """Write a syntax tree in one way, whatever the version of Python that parsed it."""
    if isinstance(node, list):
        return "[" + ",".join(map(normal, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(node, ast.FunctionDef) and body and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = body[1:]
    kept = (
        (name, value) for name, value in fields.items() if name not in SKIPPED and value is not None and value != []
    )
    return f"{type(node).__name__}(" + ",".join(f"{name}={normal(value)}" for name, value in kept) + ")"
