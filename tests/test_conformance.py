"""Every backend obeys every law, on the device that this machine has."""

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from longspan import backends
from longspan.laws import LAWS, Law

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_backend_obeys(law: Law, name: str) -> None:
    backend = backends.load(name)

    @given(st.data())
    def check(data: st.DataObject) -> None:
        problem = data.draw(law.problems, label="problem")
        try:
            law.check(backend, problem, DEVICE)
        except backends.Unsupported:
            reject()

    check()
