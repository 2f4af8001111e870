"""Why an operation of `flash` would raise `Unsupported`: asked without running anything."""

from collections.abc import Callable
from typing import Any, Final

from longspan.spec.checks import refuse

from .append import declines_append_
from .attention import declines_attention, declines_attention_varlen
from .merge import declines_add_sink, declines_merge
from .paged import declines_attention_paged
from .rope import declines_rerotate, declines_rotate, declines_rotate_qk

REASONS: Final[dict[str, Callable[..., str | None]]] = {
    "rotate": declines_rotate,
    "rotate_qk": declines_rotate_qk,
    "rerotate": declines_rerotate,
    "attention": declines_attention,
    "attention_varlen": declines_attention_varlen,
    "attention_paged": declines_attention_paged,
    "append_": declines_append_,
    "merge": declines_merge,
    "add_sink": declines_add_sink,
}


def declines(operation: str, *args: Any, **kwargs: Any) -> str | None:
    """Say why a call would raise `Unsupported`, or None; runs nothing.

    Raises:
        ValueError: For an unknown operation, or a call that means nothing.
    """
    if operation not in REASONS:
        refuse("operation", f"one of {', '.join(REASONS)}", repr(operation))
    return REASONS[operation](*args, **kwargs)
