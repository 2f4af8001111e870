"""The one table of backends, what a backend is, and how one is loaded by name.

A backend is a module with the specification's functions: same names, signatures and meaning. It does
what it is asked or raises `Unsupported`; it never hands a problem to another backend.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol, cast, runtime_checkable

from longspan.spec import AttentionState

# The order in which `auto` asks: fastest first.
NAMES: Final = ("hopper", "flash", "sdpa", "eager")

# Packages that a backend imports beyond what longspan itself requires everywhere.
NEEDS: Final[dict[str, tuple[str, ...]]] = {"hopper": ("triton",), "flash": ("triton",)}

OPERATIONS: Final = (
    "rotate", "rotate_qk", "rerotate", "attention", "attention_varlen", "attention_paged", "append_", "merge",
    "add_sink",
)  # fmt: skip


class Unsupported(NotImplementedError):  # noqa: N818 - a fact about a backend, and no error of the caller
    """A meaningful problem that this backend, or this machine, does not serve.

    Attributes:
        reason: What is not served, in one sentence.
        alternatives: Names of backends that may serve it.
    """

    def __init__(self, reason: str, *, alternatives: tuple[str, ...] = ("eager",)) -> None:
        self.reason = reason
        self.alternatives = alternatives
        super().__init__(f"{reason} (may be served by: {', '.join(alternatives) or 'no backend'})")


def serve(reason: str | None, alternatives: tuple[str, ...] = ("eager",)) -> None:
    """Raise `Unsupported` where there is a reason to."""
    if reason is not None:
        raise Unsupported(reason, alternatives=alternatives)


@runtime_checkable
class Backend(Protocol):
    """What every backend module offers; see `longspan.spec` for the meaning of each operation."""

    rotate: Callable[..., Any]
    rotate_qk: Callable[..., Any]
    rerotate: Callable[..., Any]
    attention: Callable[..., AttentionState]
    attention_varlen: Callable[..., AttentionState]
    attention_paged: Callable[..., AttentionState]
    append_: Callable[..., Any]
    merge: Callable[..., AttentionState]
    add_sink: Callable[..., AttentionState]

    def unavailable(self) -> str | None:
        """Say why this machine can never run the backend, or None."""
        ...

    def declines(self, operation: str, *args: Any, **kwargs: Any) -> str | None:
        """Say why this call would raise `Unsupported`, or None; runs nothing."""
        ...


def load(name: str) -> Backend:
    """Return a backend by name; ``"auto"`` picks one per call (`longspan.backends.auto`).

    Raises:
        ValueError: For a name that no backend has.
        Unsupported: When this machine can never run it.
    """
    if name not in {*NAMES, "auto"}:
        msg = f"backend must be one of {', '.join((*NAMES, 'auto'))}, got {name!r}"
        raise ValueError(msg)
    reason = unavailable(name)
    if reason is not None:
        raise Unsupported(reason, alternatives=tuple(other for other in NAMES if other != name))
    return module(name)


def module(name: str) -> Backend:
    """Import a backend by its name, whether or not it can run here."""
    return cast("Backend", import_module(f"longspan.backends.{name}"))


def unavailable(name: str) -> str | None:
    """Say why this machine can never run a backend, or None; a backend whose package is absent is not imported."""
    absent = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    return f"{name} needs {absent[0]}, which is not installed" if absent else module(name).unavailable()


def available() -> tuple[str, ...]:
    """Names of the backends that this machine can run, fastest first; `unavailable` says why another cannot."""
    return tuple(name for name in NAMES if unavailable(name) is None)
