"""Implementations of the specification, imported by name."""

from .registry import NAMES, OPERATIONS, Backend, Unsupported, available, load

__all__ = ["NAMES", "OPERATIONS", "Backend", "Unsupported", "available", "load"]
