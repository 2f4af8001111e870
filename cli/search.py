"""Looking for a counterexample to a law, in slices of time: Hypothesis draws and shrinks, this keeps the score."""

import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis.configuration import set_hypothesis_home_dir

from longspan.backends import Backend, Unsupported
from longspan.laws import Law

SLICES: Final = (5, 10, 20, 40)  # problems of a law's first turns, and of all later ones: soon at every law, then long
SHRINK: Final = 10.0  # seconds to spend on making a counterexample smaller


@dataclass
class Tally:
    """What is known about one law so far."""

    law: Law
    tried: int = 0
    declined: int = 0
    worst: float = 0.0
    slices: int = 0
    reasons: set[str] = field(default_factory=set)
    counterexample: Any = None
    message: str = ""
    shrunk: bool = False

    @property
    def broken(self) -> bool:
        """Whether a counterexample was found."""
        return self.counterexample is not None


class TimeIsUpError(BaseException):
    """Leaves a search from within; not an Exception, which Hypothesis would take for a failure of the law."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Hypothesis from writing folders where the user is, and warnings from the middle of a table."""
    with tempfile.TemporaryDirectory(prefix="longspan-") as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_hypothesis_home_dir(home)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


def search(tally: Tally, backend: Backend, device: torch.device, seed: int, until: float) -> None:
    """Try a law on another slice of problems: at least one, and none after a moment of `time.monotonic`.

    A counterexample is shrunk and kept in the tally. The seed of a slice depends on the run's seed, the law and the
    number of the slice alone, so that a run with the same seed meets the same problems in the same order.
    """
    giving_up = until

    def examine(problem: Any) -> None:  # noqa: ANN401 - every operation has its own problems
        nonlocal giving_up
        if tally.tried and time.monotonic() > giving_up:
            raise TimeIsUpError
        known = tally.broken
        try:
            score(tally, backend, device, problem)
        finally:
            if tally.broken and not known:
                giving_up = time.monotonic() + SHRINK

    draw = settings(
        max_examples=SLICES[min(tally.slices, len(SLICES) - 1)],
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        derandomize=False,
        suppress_health_check=cast("list[HealthCheck]", list(HealthCheck)),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    start = f"{seed}/{tally.law.name}/{tally.slices}"  # hashed alike in every process, being text
    tally.slices += 1
    try:
        seeded(start)(draw(given(tally.law.problems)(examine)))()
    except TimeIsUpError:
        pass
    except Exception:
        if not tally.broken:  # not the law's failure but the search's own
            raise
        tally.shrunk = True


def score(tally: Tally, backend: Backend, device: torch.device, problem: Any) -> None:  # noqa: ANN401
    """Check a law on one problem, and enter the outcome; once the law is broken, only smaller counterexamples count."""
    known, declined, error = tally.broken, False, 0.0
    try:
        error = tally.law.check(backend, problem, device)
    except Unsupported as refusal:
        declined = True
        tally.reasons.add(refusal.reason)
    except Exception as failure:
        tally.counterexample, tally.message = problem, told(failure)
        raise
    finally:
        if not known:
            tally.tried, tally.declined = tally.tried + 1, tally.declined + declined
            tally.worst = max(tally.worst, error)


def told(failure: Exception) -> str:
    """Write a failure as one line, with its kind where it is not the law's own."""
    text = " ".join(str(failure).split())
    return text if isinstance(failure, AssertionError) else f"{type(failure).__name__}: {text}"
