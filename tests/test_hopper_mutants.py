"""Every bug planted in a kernel of `hopper` is rejected by the law that is there to reject it, on a GPU of sm_90."""

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from planted_bugs import SIMPLE, drawn_from, rejected

from longspan import spec
from longspan.laws import LAWS, worst
from longspan.laws.hopper_mutants import HOPPER_MUTANTS, QUANTISED, QUANTISING
from longspan.laws.kernel_mutants import KernelMutant
from longspan.laws.kernels import kernels
from longspan.laws.planting import planted
from longspan.laws.quantised import quantised_bounds
from longspan.laws.strategies import attentions
from longspan.spec import masks

hopper = pytest.importorskip("longspan.backends.hopper", exc_type=ImportError)
values = pytest.importorskip("longspan.backends.hopper.values", exc_type=ImportError)

HOPPER: Final = "longspan.backends.hopper"
TRIES: Final = 4  # problems; most mutants fall to the first
CHECKS: Final = {law.name: law.check for law in LAWS}
PLAIN: Final[dict[str, Any]] = {**SIMPLE, "g": 2, "r": 1}


def heads() -> list[torch.Tensor]:
    """Draw queries, keys and values, whose largest magnitude is that of a negative number."""
    made = torch.randn(3, 1, 2, 300, 128, generator=torch.Generator().manual_seed(0)).clamp(-9, 9)
    made[..., 7, 7] = -10.0
    return list(made.to("cuda", torch.bfloat16))


def quantising_is_its_definition(backend: Any, _: Any, __: str) -> None:
    """Scales and numbers are those of the specification, bit by bit."""
    q, k, v = backend.quantise(*(given := heads()))
    for x, made in zip(given, (q, k, values.natural(values.Values(*v))), strict=True):
        expected = spec.quantise(x)
        assert torch.equal(made.scale, expected.scale)
        assert torch.equal(made.values.float(), expected.values.float())


def quantised_attention_is_its_definition(backend: Any, _: Any, __: str) -> None:
    """Attention to heads that the specification quantised stays inside their budget."""
    given = [spec.quantise(x) for x in heads()]
    state = backend.attention_quantised(*given, mask=masks.causal())
    bound = quantised_bounds(*given, mask=masks.causal(), out_dtype=state.out.dtype)
    for name in ("out", "lse"):
        assert worst(name, getattr(state, name), bound[name]) <= 1


OWN: Final = {QUANTISING: quantising_is_its_definition, QUANTISED: quantised_attention_is_its_definition}


def problems_of(mutant: KernelMutant) -> list[Any]:
    """Draw the problems that a mutant is tried on."""
    return [None] if mutant.law in OWN else drawn_from(attentions(**{**PLAIN, **mutant.fixed}), TRIES)


@pytest.mark.skipif(hopper.unavailable() is not None, reason=str(hopper.unavailable()))
@pytest.mark.parametrize("mutant", HOPPER_MUTANTS, ids=lambda mutant: mutant.name)
def test_law_rejects(mutant: KernelMutant, tmp_path: Path) -> None:
    with planted(mutant.name, mutant.edits, tmp_path, HOPPER) as backend:
        found = rejected(mutant, problems_of(mutant), (CHECKS | OWN)[mutant.law], backend, hopper, "cuda")
    assert found, f"{mutant.law} does not see that {mutant.name}"


@pytest.mark.skipif(hopper.unavailable() is None, reason="planted above, and operators cannot be registered twice")
@pytest.mark.parametrize("mutant", HOPPER_MUTANTS, ids=lambda mutant: mutant.name)
def test_bugs_can_be_planted_in_the_sources_as_they_are(mutant: KernelMutant, tmp_path: Path) -> None:
    with planted(mutant.name, mutant.edits, tmp_path, HOPPER) as backend:
        assert str(tmp_path) in repr(backend)


def test_every_kernel_has_a_mutant_and_every_mutant_a_name() -> None:
    assert {mutant.kernel for mutant in HOPPER_MUTANTS} == set(kernels(HOPPER))
    assert len({mutant.name for mutant in HOPPER_MUTANTS}) == len(HOPPER_MUTANTS)
