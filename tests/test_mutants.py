"""Every planted bug is rejected by the law that is there to reject it."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from longspan.laws import LAWS, Law
from longspan.laws.mutants import MUTANTS, Mutant

BY_NAME = {law.name: law for law in LAWS}


def examine(law: Law, mutant: Mutant) -> None:
    """Try a law on problems until one breaks it; the same problems in every run."""

    @settings(
        max_examples=600,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(st.data())
    def search(data: st.DataObject) -> None:
        law.check(mutant.backend, data.draw(law.problems))

    search()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.name}-{mutant.law}")
def test_law_rejects(mutant: Mutant) -> None:
    with pytest.raises(AssertionError):
        examine(BY_NAME[mutant.law], mutant)


def test_every_law_rejects_some_mutant() -> None:
    assert {law.name for law in LAWS} == {mutant.law for mutant in MUTANTS}
