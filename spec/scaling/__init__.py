"""RoPE scaling methods, one pure function and one file each."""

from .dynamic_ntk import dynamic_ntk
from .linear import linear
from .llama3 import llama3
from .longrope import longrope
from .none import none
from .ntk import ntk
from .ntk_by_parts import ntk_by_parts
from .proportional import proportional
from .yarn import yarn
from .yarn_paper import yarn_paper

__all__ = [
    "dynamic_ntk", "linear", "llama3", "longrope", "none", "ntk", "ntk_by_parts", "proportional", "yarn", "yarn_paper",
]  # fmt: skip
