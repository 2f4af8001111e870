"""What the verbs share: a console, one kind of complaint, and numbers that people can read."""

import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from rich.console import Console

WIDE = 120  # columns where there is no terminal to ask


class Refused(ValueError):  # noqa: N818 - a fact about the input, and no error of ours
    """Bad input, already said in one clear sentence."""


def refused(what: str, allowed: str, got: object) -> NoReturn:
    """Refuse input: what was wrong, what is allowed, what it got."""
    msg = f"{what} must be {allowed}, got {got}"
    raise Refused(msg)


def complain(sentence: str, *, code: int = 2) -> int:
    """Say on stderr what is wrong, in one line, and return the exit code for it."""
    print("longspan: " + " ".join(sentence.split()), file=sys.stderr)
    return code


def console() -> Console:
    """Where tables go: stdout, in colour on a terminal, plain and wide enough in a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False, soft_wrap=False)


def print_json(report: Mapping[str, Any]) -> None:
    """Print a report as strict JSON, which has no NaN and no infinity."""
    print(json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False))


def size(amount: float | None) -> str:
    """Write bytes in the unit that suits them."""
    if amount is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def duration(seconds: float | None) -> str:
    """Write seconds in the unit that suits them."""
    if seconds is None:
        return "–"
    if seconds >= 99.5:
        return f"{seconds / 60:.3g} min"
    scaled, unit = (
        (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    )
    return f"{scaled:.3g} {unit}"


def percent(fraction: float | None) -> str:
    """Write a fraction of a budget."""
    return "–" if fraction is None else f"{100 * fraction:.0f} %" if fraction >= 0.01 else f"{100 * fraction:.1g} %"
