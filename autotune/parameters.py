"""Launch parameters as tables hold them: what a kernel cannot be compiled with is told before it is launched."""

from collections.abc import Iterable

from .family import Values


def checked(values: Values, powers: Iterable[str], counts: Iterable[str] = ()) -> Values:
    """Return launch parameters once they are seen to be numbers that Triton takes.

    Args:
        values: The parameters; others than those named are not looked at.
        powers: Names of powers of two: sizes of tiles, warps.
        counts: Names of positive numbers.

    Raises:
        ValueError: For a number that is none, or of another kind.
    """
    for name in (*powers, *counts):
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            msg = f"{name} must be a positive number, got {value!r}"
            raise ValueError(msg)
    for name in powers:
        if int(values[name]).bit_count() != 1:
            msg = f"{name} must be a power of two, got {values[name]}"
            raise ValueError(msg)
    return values
