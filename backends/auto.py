"""Every operation on the fastest backend that serves it: chosen per call, in the order of the registry.

A backend that declines a call is passed over; `choose` says which one serves and why the others do not, and a notice
of it goes to the logger ``longspan`` at level INFO. Nothing is remembered between calls.
"""

import logging
from typing import Any, Final, NamedTuple

from torch import Tensor

from longspan.spec import AttentionState

from . import registry
from .registry import NAMES, OPERATIONS, Unsupported

LOGGER: Final = logging.getLogger("longspan")


class Choice(NamedTuple):
    """The backend that serves a call, and the reasons of the faster ones that do not."""

    name: str
    declined: dict[str, str]


def choose(operation: str, *args: Any, **kwargs: Any) -> Choice:
    """Say which backend serves a call, asked without running anything.

    A problem that means nothing is for the backend chosen to refuse.

    Raises:
        ValueError: For an unknown operation.
        Unsupported: When every backend declines.
    """
    check_operation(operation)
    declined: dict[str, str] = {}
    for name in NAMES:
        reason = registry.unavailable(name) or interpreted(name)
        reason = reason or registry.module(name).declines(operation, *args, **kwargs)
        if reason is None:
            return Choice(name, declined)
        declined[name] = reason
    raise Unsupported(said(declined), alternatives=())


def call(operation: str, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the backend chosen for it."""
    name, declined = choose(operation, *args, **kwargs)
    if declined and LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("%s runs on %s: %s", operation, name, said(declined))
    return getattr(registry.module(name), operation)(*args, **kwargs)


def interpreted(name: str) -> str | None:
    """Say that a backend would run as Python here, which a test may ask for by name and nobody else wants."""
    slow = getattr(registry.module(name), "INTERPRETED", False)
    return f"{name} is interpreted on this machine, for tests" if slow else None


def said(declined: dict[str, str]) -> str:
    """Write reasons as one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in declined.items())


def check_operation(operation: str) -> None:
    """Refuse an operation that no backend has, naming those they have."""
    if operation not in OPERATIONS:
        msg = f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}"
        raise ValueError(msg)


def unavailable() -> str | None:
    """Say why no backend can ever run on this machine, or None."""
    reasons = {name: registry.unavailable(name) for name in NAMES}
    return None if None in reasons.values() else said({name: str(reason) for name, reason in reasons.items()})


def declines(operation: str, *args: Any, **kwargs: Any) -> str | None:
    """Say why every backend declines a call, or None; runs nothing."""
    try:
        _ = choose(operation, *args, **kwargs)
    except Unsupported as refusal:
        return refusal.reason
    return None


def rotate(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See `longspan.spec.rotate`."""
    return call("rotate", x, *args, **kwargs)


def rotate_qk(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See `longspan.spec.rotate_qk`."""
    return call("rotate_qk", q, k, *args, **kwargs)


def rerotate(k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """See `longspan.spec.rerotate`."""
    return call("rerotate", k, *args, **kwargs)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionState:
    """See `longspan.spec.attention`."""
    return call("attention", q, k, v, **options)


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor, **options: Any) -> AttentionState:
    """See `longspan.spec.attention_varlen`."""
    return call("attention_varlen", q, k, v, *lengths, **options)


def attention_paged(q: Tensor, *cache: Tensor, **options: Any) -> AttentionState:
    """See `longspan.spec.attention_paged`."""
    return call("attention_paged", q, *cache, **options)


def append_(k: Tensor, v: Tensor, *cache: Tensor, **options: Any) -> None:
    """Write new keys and values into a cache in place; see `longspan.spec.append`."""
    return call("append_", k, v, *cache, **options)


def merge(*states: AttentionState) -> AttentionState:
    """See `longspan.spec.merge`."""
    return call("merge", *states)


def add_sink(state: AttentionState, sink: Tensor) -> AttentionState:
    """See `longspan.spec.add_sink`."""
    return call("add_sink", state, sink)
