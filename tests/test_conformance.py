"""Every backend obeys every law, on the device that this machine has."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan import backends
from longspan.laws import LAWS, Law

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_backend_obeys(law: Law, name: str) -> None:
    backend, served = backends.load(name), []

    @given(st.data())
    def check(data: st.DataObject) -> None:
        problem = data.draw(law.problems, label="problem")
        with suppress(backends.Unsupported):
            served.append(law.check(backend, problem, DEVICE))

    check()
    if not served:
        pytest.skip(f"{name} declines every problem of this law on {DEVICE}")
