"""The eight-bit kernels of `hopper` compile for sm_90 without one, under every Triton they are for, and fit.

A Triton other than the installed one is asked where TRITON_3_6_PYTHON, TRITON_3_7_PYTHON or TRITON_3_9_PYTHON says
which Python has it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from test_hopper_compile import SHARED, python_of

PROGRAM: Final = Path(__file__).with_name("offline_hopper_fp8.py")
ATTENTION: Final = [
    {"d": d, "mask": mask, "m": 300, "n": 384, "out": "bfloat16"}
    for d in (64, 128, 256)
    for mask in ("causal()", "everything()")
]
CUT: Final = [
    {"d": 128, "mask": "causal() & window(100)", "m": 300, "n": 500, "out": "bfloat16"},
    {"d": 256, "mask": "causal()", "m": 300, "n": 300, "out": "float32"},
]


def compiled(minor: str, problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile in a child, which an LLVM that aborts takes along."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if (python := python_of(minor)) != sys.executable:
        environment["PYTHONPATH"] = str(Path(__file__).parents[1] / ".namespace")
    command = [python, str(PROGRAM), *map(json.dumps, problems)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)  # noqa: S603 - our own source
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


# Bytes on the stack, where registers do not suffice: of the widest heads, whose sums take half of them. Up to
# 16 are the loader's, which has few registers, and stay there from start to end.
STACK: Final = {"3.6": 16, "3.7": 16, "3.9": 256}


@pytest.mark.parametrize("minor", list(STACK))
def test_attention_fits_and_spills_next_to_nothing(minor: str) -> None:
    found = compiled(minor, [*ATTENTION, *CUT])
    assert [each["problem"] for each in found] == [*ATTENTION, *CUT]
    for each in found:
        wide = each["problem"]["d"] == 256
        assert each["shared"] <= SHARED, each
        assert each["stack"] <= (STACK[minor] if wide else 16), each


@pytest.mark.parametrize("minor", ["3.6", "3.7", "3.9"])
def test_quantising_fits(minor: str) -> None:
    found = compiled(minor, [{"d": d} for d in (64, 128, 256)])
    assert [each["name"] for each in found] == ["largest_kernel", "quantise_kernel"] * 9
    for each in found:
        assert each["shared"] <= SHARED, each
        assert each["stack"] == 0, each
