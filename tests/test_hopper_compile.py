"""The forward kernel of `hopper` compiles for sm_90 without one, under every Triton it is for.

A Triton other than the installed one is asked where a variable says which Python has it: TRITON_3_6_PYTHON,
TRITON_3_7_PYTHON, TRITON_3_9_PYTHON.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import pytest

# A problem an argument: head and value dimension, mask, options. An LLVM that aborts kills a child.
OFFLINE: Final = """
import json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget

from longspan.laws.offline import pretend

pretend(triton, GPUTarget("cuda", 90, 32))
from longspan.backends.flash import lowering
from longspan.backends.hopper import forward, spans
from longspan.backends.hopper.launch import Call
from longspan.spec import masks

class Offline:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **options: compiled.append(self.kernel.warmup(*args, grid=grid, **options))

lowering.lowered_there = lambda *_: None  # no kernel runs here
forward.forward_kernel, spans.spans_kernel = Offline(forward.forward_kernel), Offline(spans.spans_kernel)
for problem in sys.argv[1:]:
    compiled, asked = [], json.loads(problem)
    m, head = 384, torch.zeros(4)
    q, v = (torch.zeros(2, 4, m, asked[name], dtype=torch.bfloat16) for name in "de")
    seen = lowering.lower(eval(asked["mask"], {**vars(masks)}), 2, m, m, q_offset=None, k_offset=0, device=q.device)
    each = torch.zeros(2, 4, dtype=torch.int32) if asked.get("lengths") else seen.sequences
    call = Call(
        head if asked.get("sink") else None, head if asked.get("alibi") else None, seen.rows, each,
        tuple(seen.interval), asked.get("scale", 0.1), asked.get("softcap"),
        getattr(torch, asked.get("out", "bfloat16")),
    )
    forward.forward(call, q, q, v)
    for kernel in compiled:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            lines = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", listed)}
        spills = len(re.findall(r"\\b(?:STL|LDL)\\b", lines))
        print(json.dumps([kernel.metadata.name, kernel.metadata.shared, used["STACK"] + used["LOCAL"], spills]))
"""
SHARED: Final = 227 * 1024  # bytes that one program may have
MASKS: Final = ("everything()", "causal()", "causal() & window(90)")
DENSE: Final = [{"d": d, "e": d, "mask": mask} for d in (64, 128, 256) for mask in MASKS]
RICH: Final = [
    {"d": 80, "e": 96, "mask": "documents([100, 150], [100, 170]) & window(30, keep_first=3) & causal()",
     "softcap": 9.0, "alibi": True, "sink": True, "out": "float32"},
    {"d": 64, "e": 64, "mask": "causal()", "lengths": True, "scale": -1.0},
]  # fmt: skip


def python_of(minor: str) -> str:
    """Find a Python that has a Triton, or skip the test."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = "absent"
    if installed.startswith(f"{minor}."):
        return sys.executable
    name = f"TRITON_{minor.replace('.', '_')}_PYTHON"
    if name not in os.environ:
        pytest.skip(f"triton here is {installed}, and {name} names no Python that has {minor}")
    return os.environ[name]


def compiled(minor: str, problems: list[dict[str, object]]) -> list[tuple[str, int, int, int]]:
    """Compile in a child: name, bytes of shared memory, bytes of stack and accesses to it, of every kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / ".namespace")
    command = [python_of(minor), "-c", OFFLINE, *map(json.dumps, problems)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)  # noqa: S603 - our own source
    assert child.returncode == 0, child.stderr[-2000:]
    return [tuple(json.loads(line)) for line in child.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("minor", ["3.6", "3.7", "3.9"])
def test_it_compiles_and_fits_and_dense_loops_spill_nothing(minor: str) -> None:
    found = [one for one in compiled(minor, [*DENSE, *RICH]) if one[0] == "forward_kernel"]
    assert len(found) == len(DENSE) + len(RICH)
    assert max(shared for _, shared, *_ in found) <= SHARED
    for problem, (_, _, stack, spills) in zip(DENSE, found, strict=False):
        # The loader has 24 registers, and may keep two numbers of every thread on the stack from start to end.
        assert stack <= 8, problem
        assert spills <= 4, problem
