"""Plant a bug in the sources of `flash` or `hopper`, and import the whole of it under a name of its own.

Kernels are text to Triton: it reads a function's source again to compile or interpret it. So the folder is copied with
one snippet replaced, and the copy is a backend like any other, with operators in a namespace of its own.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple, cast

from longspan.backends import Backend

from .kernels import FLASH, folder


class Edit(NamedTuple):
    """One snippet of one module of a backend, and what stands there instead."""

    module: str
    snippet: str
    instead: str


def edited(text: str, edits: list[Edit]) -> str:
    """Make edits, each of which finds its snippet exactly once.

    Raises:
        LookupError: Where a snippet is not there, or is there twice: the sources have moved on, and so must the edit.
    """
    for edit in edits:
        if (count := text.count(edit.snippet)) != 1:
            msg = f"{edit.module}.py has {count} times, not once: {edit.snippet!r}"
            raise LookupError(msg)
        text = text.replace(edit.snippet, edit.instead)
    return text


@contextmanager
def planted(name: str, edits: tuple[Edit, ...], home: Path, original: str = FLASH) -> Iterator[Backend]:
    """Import a copy of a backend with edits made, from an empty folder.

    Raises:
        LookupError: See `edited`.
    """
    sources = sorted(folder(original).glob("*.py"))
    unknown = {edit.module for edit in edits} - {source.stem for source in sources}
    if unknown:
        msg = f"{original} has no modules {sorted(unknown)}"
        raise LookupError(msg)
    for source in sources:
        text = edited(source.read_text("utf-8"), [edit for edit in edits if edit.module == source.stem])
        text = text.replace('"longspan::', f'"longspan_{name}::').replace("ops.longspan.", f"ops.longspan_{name}.")
        (home / source.name).write_text(text, "utf-8")
    package = f"{original}_{name}"  # beside the original, so that its relative imports find the registry
    spec: Any = spec_from_file_location(package, home / "__init__.py", submodule_search_locations=[str(home)])
    module = sys.modules[package] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield cast("Backend", module)
    finally:
        for imported in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
            del sys.modules[imported]
