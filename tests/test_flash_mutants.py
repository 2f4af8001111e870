"""Every bug planted in a kernel of `flash` is rejected by the law that is there to reject it."""

from collections.abc import Callable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from planted_bugs import SIMPLE, drawn_from, rejected

from longspan.backends import Backend, flash
from longspan.backends.flash.launch import quiet
from longspan.laws import LAWS, SMALL
from longspan.laws.kernel_mutants import KERNEL_MUTANTS, KernelMutant
from longspan.laws.kernel_races import RACES
from longspan.laws.kernels import kernels
from longspan.laws.planting import planted
from longspan.laws.problems import Attention
from longspan.laws.strategies import attentions, rotates

interpreted = pytest.mark.skipif(not flash.INTERPRETED, reason="mutants of kernels are interpreted")
TRIES = 12  # problems; most mutants fall to the first
CHECKS = {law.name: law for law in LAWS}
# What every problem has besides: each is served, and small.
PLAIN: dict[str, Any] = {
    **SIMPLE, "g": 1, "dtype": st.sampled_from(["float32", "float16"]), "mask": "causal()",
}  # fmt: skip
NORESERVE = 0x4000  # mmap.MAP_NORESERVE of Linux, which Python 3.11 does not name
TURNS = {name: SMALL[name] for name in ("b", "m", "d", "r")}


def far_tensors_are_near_tensors(backend: Backend, _: Any, device: str) -> float:
    """Sequences that lie 2^30 elements apart are read like those that lie side by side."""
    near = torch.randn(3, 1, 9, 16, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    # Pages that are reserved only where they are touched; 2^32 elements, so that an offset that wraps stays inside.
    room = torch.frombuffer(
        mmap(-1, 2 * (2**32 + 256), flags=MAP_PRIVATE | MAP_ANONYMOUS | NORESERVE), dtype=near.dtype
    )
    # An odd origin is nothing that a descriptor describes: it is read by pointers.
    far = room.as_strided(near.shape, (2**30, 144, 16, 1), 2**31 + 1)
    far.copy_(near)
    found, expected = backend.attention(far, far, far), backend.attention(near, near, near)
    assert torch.equal(found.out, expected.out), "far tensors are misread"
    return 0.0


def problems_of(mutant: KernelMutant) -> list[Any]:
    """Draw the problems that a mutant is tried on."""
    if mutant.law not in CHECKS:
        return [None]
    turning = CHECKS[mutant.law].operation in {"rotate", "rotate_qk", "rerotate"}
    strategy = (
        rotates(**{**TURNS, "dtype": "float32", **mutant.fixed})
        if turning
        else attentions(**{**SMALL, **PLAIN, **mutant.fixed})
    )
    return drawn_from(strategy, TRIES)


def check_of(mutant: KernelMutant) -> Callable[..., float]:
    """Find the law that must reject a mutant."""
    return CHECKS[mutant.law].check if mutant.law in CHECKS else far_tensors_are_near_tensors


@interpreted
@pytest.mark.parametrize("mutant", KERNEL_MUTANTS, ids=lambda mutant: mutant.name)
def test_law_rejects(mutant: KernelMutant, tmp_path: Path) -> None:
    with planted(mutant.name, mutant.edits, tmp_path) as backend:
        found = rejected(mutant, problems_of(mutant), check_of(mutant), backend, flash, "cpu", quiet)
    assert found, f"{mutant.law} does not see that {mutant.name}"


def test_every_kernel_has_a_mutant() -> None:
    assert {mutant.kernel for mutant in KERNEL_MUTANTS} == set(kernels())


def test_every_name_is_used_once() -> None:
    names = [mutant.name for mutant in KERNEL_MUTANTS]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
@pytest.mark.parametrize("race", RACES, ids=lambda race: race.name)
def test_a_gpu_shows_races_that_an_interpreter_does_not(race: KernelMutant, tmp_path: Path) -> None:
    on_gpu = not flash.INTERPRETED
    problem = Attention(h=2, g=2, m=64, n=4096 if on_gpu else 96, d=64, e=64, amplitude=0.1, seed=1)
    check = CHECKS[race.law].check

    def often(backend: Any) -> None:
        for _ in range(20 if on_gpu else 1):
            check(backend, problem, "cuda" if on_gpu else "cpu")

    with planted(race.name, race.edits, tmp_path) as backend:
        if on_gpu:
            with pytest.raises(AssertionError):
                often(backend)
        else:
            often(backend)
    often(flash)
