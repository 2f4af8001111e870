# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false
"""Compile the eight-bit kernels of `hopper` for sm_90 without a GPU: what each uses and spills, one JSON line a kernel.

Run as a program, without TRITON_INTERPRET, with problems as JSON: an LLVM that aborts takes it along.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from longspan.backends.flash.lowering import lower
from longspan.backends.hopper import fp8_forward, quantise_launch
from longspan.backends.hopper.values import Values
from longspan.laws.offline import pretend
from longspan.spec import Quantised, masks
from longspan.spec.quantise import E4M3


class Offline:
    """A kernel that is compiled and not launched."""

    def __init__(self, kernel: Any) -> None:
        """Keep the kernel."""
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """Compile instead of launching."""
        return lambda *args, **flags: COMPILED.append(self.kernel.warmup(*args, grid=grid, **flags))


COMPILED: list[Any] = []


def used(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel uses: bytes of shared memory and of stack, and accesses to that."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        listed, lines = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603
            for what in ("-res-usage", "-sass")
        )
    stack = sum(int(value) for _, value in re.findall(r"(STACK|LOCAL):(\d+)", listed))
    spills, moved = (len(re.findall(rf"\b(?:{ops})\b", lines)) for ops in ("STL|LDL", r"SHFL\.IDX|PRMT"))
    return {"name": kernel.metadata.name, "shared": kernel.metadata.shared, "stack": stack, "spills": spills,
            "moved": moved}  # fmt: skip


def attend(d: int, mask: str, m: int, n: int, out: str) -> None:
    """Compile attention."""
    q, k = (Quantised(torch.zeros(2, 4, x, d, dtype=E4M3), torch.ones(2, 4, 1)) for x in (m, n))
    v = Values(torch.zeros(2, 4, d, -(-n // 16) * 16, dtype=E4M3), k.scale, n)
    seen = lower(eval(mask, {**vars(masks)}), 2, m, n, q_offset=None, k_offset=0, device=k.scale.device)  # noqa: S307
    fp8_forward.forward(q, k, v, seen, 0.1, getattr(torch, out))


def round_heads(d: int) -> None:
    """Compile quantisation: plain, turned, and of values."""
    x = torch.zeros(2, 4, 300, d, dtype=torch.bfloat16)
    quantise_launch.quantised(x)
    quantise_launch.quantised(x, torch.ones(d))
    quantise_launch.quantised(x, values=True)


if __name__ == "__main__":
    pretend(triton, GPUTarget("cuda", 90, 32))
    for module, name in (
        (fp8_forward, "fp8_kernel"), (quantise_launch, "largest_kernel"), (quantise_launch, "quantise_kernel")
    ):  # fmt: skip
        setattr(module, name, Offline(getattr(module, name)))
    for problem in map(json.loads, sys.argv[1:]):
        COMPILED.clear()
        (attend if "mask" in problem else round_heads)(**problem)
        for kernel in COMPILED:
            sys.stdout.write(json.dumps({"problem": problem, **used(kernel)}) + "\n")
