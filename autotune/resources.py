"""What a compiled kernel takes of a multiprocessor, read from the compilation itself and without a GPU."""

import re
import subprocess
import tempfile
from typing import Any, Final

SPILLED: Final = 64  # bytes of stack from which on registers are taken to spill in earnest
USAGE: Final = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
AMD: Final = {
    "registers": r"\.vgpr_count:\s*(\d+)",
    "stack": r"\.private_segment_fixed_size:\s*(\d+)",
    "spills": r"\.vgpr_spill_count:\s*(\d+)",
}


def resources(kernel: Any) -> dict[str, int]:
    """Return registers and bytes of stack of a thread, bytes of shared memory and warps of a program."""
    metadata = kernel.metadata
    found = {"shared": int(metadata.shared), "num_warps": int(metadata.num_warps)}
    if getattr(metadata, "tmem_size", None):
        found["tmem"] = int(metadata.tmem_size)
    if "cubin" in kernel.asm:
        return found | nvidia(kernel.asm["cubin"])
    text = str(kernel.asm["amdgcn"])
    for name, pattern in AMD.items():
        seen = re.search(pattern, text)
        found[name] = int(seen[1]) if seen else 0
    return found


def nvidia(cubin: bytes) -> dict[str, int]:
    """Ask the cuobjdump of Triton's own wheel; spilled registers live on the stack."""
    from triton import knobs  # noqa: PLC0415 - workers alone have it loaded

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout  # noqa: S603
    seen = {name: int(number) for name, number in USAGE.findall(said)}
    return {"registers": seen.get("REG", 0), "stack": seen.get("STACK", 0), "spills": seen.get("LOCAL", 0)}


def spills(found: dict[str, Any]) -> int:
    """Bytes of stack beyond what a kernel without spills may have: what is tried last."""
    stack = int(found.get("stack", 0)) + int(found.get("spills", 0))
    return stack if stack > SPILLED else 0
