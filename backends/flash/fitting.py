"""A launch whose tuned choice does not fit is made again, by the heuristic.

What is tuned is a plain problem; another mask, cap or stride compiles other code, which may need more shared memory
than the device has. Triton says so before it launches anything.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from triton.runtime.errors import OutOfResources

from longspan.autotune import overridden, untuned
from longspan.autotune.lookup import SHELF


def fitting(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch by the heuristic what does not fit otherwise, and say so once; a choice that was forced may fail."""

    @wraps(launch)
    def run(*args: Any) -> Any:
        try:
            return launch(*args)
        except OutOfResources as lack:
            if overridden():
                raise
            SHELF.say(f"a tuned choice of {launch.__name__} does not fit this problem ({lack}): the heuristic serves")
            with untuned():
                return launch(*args)

    return run
