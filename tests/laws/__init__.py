"""The contract as laws: functions over a backend that Hypothesis quantifies over, and the budget that judges them."""

from .budget import Bound, attention_bounds, rotate_bound, worst
from .problems import Attention, Inputs, Rotate
from .strategies import SMALL
from .table import LAWS, Law, laws

__all__ = [
    "LAWS", "SMALL", "Attention", "Bound", "Inputs", "Law", "Rotate",
    "attention_bounds", "laws", "rotate_bound", "worst",
]  # fmt: skip
