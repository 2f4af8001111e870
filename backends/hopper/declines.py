"""Why an operation of `hopper` would raise `Unsupported`: asked without running anything."""

from collections.abc import Callable
from typing import Any, Final

from longspan.spec.checks import refuse

from ..flash.declines import REASONS as SHARED
from .attention import declines_attention, declines_attention_paged, declines_attention_varlen
from .fp8 import declines_attention_quantised, declines_quantise

REASONS: Final[dict[str, Callable[..., str | None]]] = {
    **SHARED,
    "attention": declines_attention,
    "attention_varlen": declines_attention_varlen,
    "attention_paged": declines_attention_paged,
    "quantise": declines_quantise,
    "attention_quantised": declines_attention_quantised,
}


def declines(operation: str, *args: Any, **kwargs: Any) -> str | None:
    """Say why a call would raise `Unsupported`, or None; runs nothing.

    Raises:
        ValueError: For an unknown operation, or a call that means nothing.
    """
    if operation not in REASONS:
        refuse("operation", f"one of {', '.join(REASONS)}", repr(operation))
    return REASONS[operation](*args, **kwargs)
