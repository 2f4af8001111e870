"""The kernels of `flash`, or of another backend, found in its sources, and which of them a call launches.

Tests go by what is found here and keep no list of their own: a kernel that is added and not tested fails by name.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

FLASH: Final = "longspan.backends.flash"


def folder(package: str = FLASH) -> Path:
    """Where the sources of a backend lie."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        msg = f"{package} has no sources here"
        raise ImportError(msg)
    return Path(spec.origin).parent


def kernels(package: str = FLASH) -> dict[str, str]:
    """Module of every kernel: of each function that Triton compiles and whose name ends in ``_kernel``."""
    found = {}
    for file in sorted(folder(package).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
                if "jit" in decorators:
                    found[node.name] = file.stem
    return found


@contextmanager
def launches(instead: Callable[..., Any] | None = None) -> Iterator[list[str]]:
    """Write down the name of every kernel that is launched.

    Args:
        instead: Called in place of a launch, with Triton's ``run`` of that kernel and its arguments.
    """
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415 - only who asks needs Triton
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    names: list[str] = []

    def recorder(run: Callable[..., Any]) -> Callable[..., Any]:
        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(self.fn.__name__)
            return run(self, *args, **kwargs) if instead is None else instead(run, self, *args, **kwargs)

        return record

    with (
        patch.object(JITFunction, "run", recorder(JITFunction.run)),
        patch.object(InterpretedFunction, "run", recorder(InterpretedFunction.run)),
    ):
        yield names
