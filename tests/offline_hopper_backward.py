"""Compile hopper's backward kernels for sm_90 without a GPU, and count what their loops spill: one JSON line a case.

Run as a program, without TRITON_INTERPRET, with the names of cases or none for all: an LLVM that aborts takes it along.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from longspan.backends.hopper.backward import choose, widths
from longspan.backends.hopper.backward_kernel import backward_kernel
from longspan.backends.hopper.backward_wide_kernel import backward_wide_kernel
from longspan.backends.hopper.gluon import gl

# What the kernel is compiled for beside the dimensions: as `backward.launch` says it.
FLAGS = ("ROWS", "EACH", "KEEP", "SOFTCAP", "ALIBI", "DEAD")
HEADS = {"64": (64, 64), "128": (128, 128), "128/64": (128, 64), "192/128": (192, 128), "256": (256, 256)}
MASKS: dict[str, tuple[str, ...]] = {
    "dense": (), "lengths": ("EACH", "DEAD"), "documents": ("ROWS", "DEAD"), "softcap": ("SOFTCAP",),
    "window with head": ("ROWS", "KEEP", "DEAD"), "alibi": ("ALIBI",),
}  # fmt: skip
CASES = {f"{heads} {mask}": (heads, mask) for heads in HEADS for mask in MASKS}
CASES["128 deterministic"] = ("128", "deterministic")


def description(block: list[int], dtype: Any, name: str) -> str:
    """Type of a descriptor, as the compiler reads it."""
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return f"tensordesc<{name}[{','.join(map(str, block))}],{layout!r}>"


def compile_case(heads: str, mask: str) -> Any:
    """Compile a kernel as it is shipped."""
    flags = dict.fromkeys(FLAGS, False) | dict.fromkeys(MASKS.get(mask, ()), True)
    d, e = HEADS[heads]
    choice = choose(d, e, plain=not flags["ROWS"] and not flags["SOFTCAP"])
    columns, value_columns = widths(d, e)
    constants: dict[str, Any] = {
        **flags, "ADD": mask != "deterministic", "M": choice.tile_m, "N": choice.tile_n, "D": columns,
        "E": value_columns, "STAGES": choice.stages,
    }  # fmt: skip
    wide = max(d, e) > 128
    if not wide:
        constants["PERSISTENT"] = choice.persistent
    kernel = backward_wide_kernel if wide else backward_kernel
    columns, value_columns = (columns // 2, value_columns // 2) if wide else (columns, value_columns)
    keys = choice.tile_n if wide else choice.tile_n // 2
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("scale", "inner", "outer", "full_scale"), "fp32")
    for names, rows, width in (
        (("q",), choice.tile_m, columns), (("d_out",), choice.tile_m, value_columns),
        (("k", "dk"), keys, columns), (("v", "dv"), keys, value_columns),
    ):  # fmt: skip
        types |= dict.fromkeys(names, description([1, 1, rows, width], gl.bfloat16, "bf16"))
    types |= dict.fromkeys(("lse_two", "delta"), description([1, choice.tile_m], gl.float32, "fp32"))
    pointers = {
        "sums": "*fp32",
        "alibi": "*fp32",
        "rows": "*i32",
        "sequences": "*i32",
        "seers": "*i32",
        "counter": "*i32",
    }
    there = {
        "sums": constants["ADD"], "alibi": flags["ALIBI"], "rows": flags["ROWS"], "sequences": flags["EACH"],
        "seers": flags["ROWS"], "counter": True,
    }  # fmt: skip
    for name, kind in pointers.items():
        if name in types:
            types[name] = kind if there[name] else "constexpr"
            if not there[name]:
                constants[name] = None
    if constants["ADD"] and not wide and not choice.persistent:
        layout = gl.NVMMASharedLayout(0, 32, 2)
        types["sums"] = f"tensordesc<fp32[{choice.tile_m * columns // 256},128],{layout!r}>"
    types |= dict.fromkeys((name for name in constants if name in types), "constexpr")
    at = {name: (kernel.arg_names.index(name),) for name in types}
    aligned = {at[name]: [["tt.divisibility", 16]] for name in pointers if types.get(name, "").startswith("*")}
    source = GluonASTSource(kernel, types, {at[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def spilled(binary: bytes) -> int:
    """Count the instructions that move registers to or from local memory inside the loops over queries."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout  # noqa: S603
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)]
    back = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"BRA.* 0x([0-9a-f]+)", text))]

    def count(low: int, high: int, pattern: str) -> int:
        return sum(low <= at <= high and re.search(pattern, text) is not None for at, text in code)

    loops = [(low, high) for low, high in back if low < high and count(low, high, "HGMMA") >= 8]
    # The innermost; and not those that only return from a wait, which was moved out of the way, into a loop.
    loops = [
        x for x in loops
        if not any(x != y and ((x[0] <= y[0] and y[1] <= x[1]) or y[0] < x[0] <= y[1] < x[1]) for y in loops)
    ]  # fmt: skip
    assert len(loops) == 2, f"two warpgroups have a loop each, found {loops}"
    return sum(count(*loop, r"\b(STL|LDL)\b") for loop in loops)


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    for case in sys.argv[1:] or CASES:
        compiled = compile_case(*CASES[case])
        result = {"case": case, "spilled": spilled(compiled.asm["cubin"]), "shared": compiled.metadata.shared}
        sys.stdout.write(json.dumps({**result, "triton": triton.__version__}) + "\n")
        sys.stdout.flush()
