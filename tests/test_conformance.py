"""Every backend obeys every law, on the device that this machine has."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import backends
from longspan.laws import LAWS, SMALL, Law, laws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


INTERPRETED = ("flash",) if DEVICE == "cpu" else ()  # kernels that run here as Python, a thousand times slower
SMALL_LAWS = {law.name: law for law in laws(**SMALL)}


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_backend_obeys(law: Law, name: str) -> None:
    backend, served = backends.load(name), []
    problems = SMALL_LAWS[law.name].problems if name in INTERPRETED else law.problems

    @settings(max_examples=25 if name in INTERPRETED else settings().max_examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        problem = data.draw(problems, label="problem")
        with suppress(backends.Unsupported):
            served.append(law.check(backend, problem, DEVICE))

    check()
    if not served:
        pytest.skip(f"{name} declines every problem of this law on {DEVICE}")
