"""Every backend obeys every law, on the device that this machine has.

With ``HYPOTHESIS_PROFILE=gpu``, a backend that compiles its kernels does so on a thousand random problems a law.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan import backends
from longspan.backends import eager
from longspan.laws import LAWS, SMALL, Law, laws
from longspan.laws.kernels import FLASH, kernels
from longspan.laws.variants import MOST, VARIANT_LAWS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = ("flash",) if DEVICE == "cpu" else ()  # kernels that run here as Python, a thousand times slower
COMPILED = ("flash", "hopper") if DEVICE == "cuda" else ()  # kernels that take seconds to compile, anew for every kind
SMALL_LAWS = {law.name: law for law in laws(**SMALL)}
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "gpu"
PARTS = 4  # of a thousand examples, for processes side by side


def problems_of(law: Law, name: str) -> st.SearchStrategy[Any]:
    """Draw problems that a backend can bear: small if it is interpreted, of few kinds if it compiles."""
    if name in INTERPRETED:
        return SMALL_LAWS[law.name].problems
    return VARIANT_LAWS[law.name].problems if name in COMPILED else law.problems


def examples_of(name: str) -> int:
    """How many problems a backend is tried on, by each part."""
    if name in INTERPRETED:
        return 25
    if THOROUGH:
        return settings().max_examples // PARTS if name in COMPILED else 50
    return settings().max_examples


def parts() -> Iterator[Any]:
    """Every law for every backend, in as many parts as it takes."""
    for law in LAWS:
        for name in backends.available():
            for part in range(PARTS if THOROUGH and name in COMPILED else 1):
                yield pytest.param(law, name, id=f"{law.name}-{name}{f'-{part}' if part else ''}")


@pytest.mark.parametrize(("law", "name"), [*parts()])
def test_backend_obeys(law: Law, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    backend, served = backends.load(name), []

    @settings(max_examples=examples_of(name))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        problem = data.draw(problems_of(law, name), label="problem")
        with suppress(backends.Unsupported):
            served.append(law.check(backend, problem, DEVICE))

    check()
    if name == "flash" and DEVICE == "cuda":
        assert_few_were_compiled(tmp_path_factory.getbasetemp())
    if not served:
        pytest.skip(f"{name} declines every problem of this law on {DEVICE}")


@pytest.mark.parametrize("law", VARIANT_LAWS.values(), ids=list(VARIANT_LAWS))
def test_problems_of_few_variants_are_problems(law: Law) -> None:
    @settings(max_examples=5, derandomize=True)
    @given(law.problems)
    def check(problem: Any) -> None:
        assert law.check(eager, problem, "cpu") <= 1

    check()


def test_variants_are_compiled_beforehand_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longspan.laws.warm", "sm_90", "sinks_are_keys_without_value", "4", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert child.returncode == 0, child.stderr[-2000:]
    variants, compiled = list(tmp_path.glob("merge_kernel-*")), list(tmp_path.glob("cache/*/merge_kernel.cubin"))
    assert len(variants) == len(compiled) > 0


def assert_few_were_compiled(home: Path) -> None:
    """Count the variants of every kernel, over all processes of this run."""
    home = (home.parent if "PYTEST_XDIST_WORKER" in os.environ else home) / "variants"
    for name, module in kernels().items():
        kernel = getattr(import_module(f"{FLASH}.{module}"), name)
        folder = home / name
        folder.mkdir(parents=True, exist_ok=True)
        for key in kernel.device_caches[torch.cuda.current_device()][0]:
            (folder / sha256(str(key).encode()).hexdigest()).touch()
        count = len(list(folder.iterdir()))
        assert count <= MOST, f"{count} variants of {name} were compiled, and at most {MOST} were meant to be"
