"""Choices of launch parameters, measured once per GPU: `longspan tune` makes them, a launch looks them up.

This package knows no kernel. A kernel family says what there is to choose, what serves without tuning, and how to
launch (`family`); choices are compiled in workers that may die (`pool`, `compiler`), verified before they are timed,
raced (`race`), written down so that a crash loses at most one (`journal`), and served from tables (`lookup`).
"""

from .family import Case, Family, Values
from .lookup import Asked, Lookup, forget, on_forget, overridden, override, untuned
from .parameters import checked

__all__ = [
    "Asked", "Case", "Family", "Lookup", "Values", "checked", "forget", "on_forget", "overridden", "override",
    "untuned",
]  # fmt: skip
