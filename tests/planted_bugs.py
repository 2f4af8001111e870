"""How planted bugs in kernels are tried: on problems that are drawn once, and until a law rejects one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from longspan.laws.kernel_mutants import KernelMutant
from longspan.laws.kernels import launches

# What every problem has unless a mutant needs something else.
SIMPLE: Final[dict[str, Any]] = {
    "b": 1, "needle": False, "mean": 0.0, "amplitude": 1.0, "softcap": None, "sink": None, "alibi": None,
    "scale": None, "q_offset": None, "k_offset": 0, "out_dtype": None, "storage": "bhmd", "k_storage": None,
    "v_storage": None, "d_out_storage": "bhmd", "trained": "qkvs", "dead": 0.0,
}  # fmt: skip


def drawn_from(strategy: st.SearchStrategy[Any], tries: int) -> list[Any]:
    """Draw problems; the same in every run."""
    drawn: list[Any] = []

    @settings(
        max_examples=tries, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(strategy)
    def draw(problem: Any) -> None:
        drawn.append(problem)

    draw()
    return drawn


def rejected(
    mutant: KernelMutant, problems: list[Any], check: Callable[..., Any], backend: Any, honest: Any, device: str,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> bool:  # fmt: skip
    """Whether a law rejects a backend with a planted bug on one of the problems, which the honest one passes.

    Args:
        mutant: The bug.
        problems: What the law is tried on, in turn.
        check: The law.
        backend: Has the bug.
        honest: The backend as it is.
        device: Where both run.
        around: What the one with the bug runs in.
    """
    for problem in problems:
        try:
            with launches() as names, around():
                check(backend, problem, device)
        except AssertionError:
            assert mutant.kernel in names
            check(honest, problem, device)
            return True
    return False
