"""hopper's backward kernels compile for sm_90 without one, under every Triton they are for, and fit its registers.

A Triton other than the installed one is asked where TRITON_3_6_PYTHON, TRITON_3_7_PYTHON or TRITON_3_9_PYTHON says
which Python has it.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import pytest

PROGRAM: Final = Path(__file__).with_name("offline_hopper_backward.py")
SHARED: Final = 227 * 1024  # bytes that one program may have
DENSE: Final = ["64 dense", "128 dense", "256 dense", "192/128 dense", "128 deterministic"]
RICH: Final = ["64 softcap", "128 documents", "256 window with head"]
# Moves to and from local memory in the loops of both warpgroups, where registers do not suffice.
SPILLS: Final = {
    "3.6": {"128 dense": 5, "128 documents": 8},
    "3.7": {"128 dense": 5, "128 documents": 4},
    "3.9": {"128 dense": 34, "128 documents": 43, "256 window with head": 1},
}


def compiled(minor: str, cases: list[str]) -> list[dict[str, Any]]:
    """Compile in a child, which an LLVM that aborts takes along."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = "absent"
    python = sys.executable
    if not installed.startswith(f"{minor}."):
        name = f"TRITON_{minor.replace('.', '_')}_PYTHON"
        if name not in os.environ:
            pytest.skip(f"triton here is {installed}, and {name} names no Python that has {minor}")
        python = os.environ[name]
        environment["PYTHONPATH"] = str(Path(__file__).parents[1] / ".namespace")
    command = [python, str(PROGRAM), *cases]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603 - our own source
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("minor", list(SPILLS))
@pytest.mark.parametrize("cases", [DENSE, RICH], ids=["dense", "rich"])
def test_every_kernel_fits_shared_memory_and_registers(minor: str, cases: list[str]) -> None:
    found = compiled(minor, cases)
    assert [each["case"] for each in found] == cases
    for each in found:
        assert each["shared"] <= SHARED, each
        assert each["spilled"] <= SPILLS[minor].get(each["case"], 0), each
