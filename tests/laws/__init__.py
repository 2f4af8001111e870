"""The contract as laws: functions over a backend that Hypothesis quantifies over, and the budget that judges them."""

from .budget import Bound, attention_bounds, rotate_bound, worst
from .problems import Attention, Inputs, Rotate
from .table import LAWS, Law

__all__ = ["LAWS", "Attention", "Bound", "Inputs", "Law", "Rotate", "attention_bounds", "rotate_bound", "worst"]
