"""How every test runs: shapes of the specification checked, examples reproducible, one thread, the machine named."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, Triton interprets the same kernels on this CPU. It must be told before it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What this user has tuned on this machine must not decide what a test launches, nor what another worker's test tuned.
if "LONGSPAN_TUNE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["LONGSPAN_TUNE_DIR"] = tempfile.mkdtemp(prefix="longspan-tests-")
    atexit.register(shutil.rmtree, os.environ["LONGSPAN_TUNE_DIR"], ignore_errors=True)

# jaxtyping rewrites functions as they are imported: later would be too late, and nothing would be checked.
if any(name.startswith("longspan.spec") for name in sys.modules):
    msg = "longspan.spec was imported before tests/conftest.py could instrument it"
    raise pytest.UsageError(msg)
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "gpu"  # a thousand examples, of shapes that every other run checks
CHECKED = find_spec("beartype") is not None and not THOROUGH
if CHECKED:
    from jaxtyping import install_import_hook

    # The tower: an int is welcome where a float is, as to every other type checker.
    install_import_hook("longspan.spec", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Laws differ in cost by a thousand times, and machines by ten: time is not what they test.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True, max_examples=100)
settings.register_profile("gpu", settings.get_profile("dev"), print_blob=True, max_examples=1000, database=None)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=5)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

torch.set_num_threads(1)  # small problems only lose time in a thread pool


MOST = 12  # workers beside one GPU, each of which holds a context and its kernels there


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as there are cores to run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST) if torch.cuda.is_available() else cores


def installed(package: str) -> str:
    """Version of a package, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def pytest_report_header() -> list[str]:
    """State what a result depends on: a bug report that pastes the header is complete."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = ", ".join(f"{package} {installed(package)}" for package in ("torch", "triton", "numpy", "transformers"))
    shapes = "checked at every call" if CHECKED else "not checked: no beartype, or the profile gpu"
    return [f"longspan: {device}; {versions}", f"longspan: shapes of longspan.spec are {shapes}"]
