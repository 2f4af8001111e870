"""Peak memory of a call, measured: the CUDA allocator's own count, or the kernel's high-water mark of the process."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

PROCESS: Final = Path("/proc/self")
HOW: Final = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "the kernel's high-water mark of the process's resident memory (VmHWM), less what was resident before",
}


def peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Run a call and return its result and the bytes it took at most beyond what was there; None if unmeasurable."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    before = reset()
    result = call()
    after = status("VmHWM")
    return result, None if before is None or after is None else max(after - before, 0)


def reset() -> int | None:
    """Give freed memory back, set the high-water mark to what is resident, and return that."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5", "ascii")
    except OSError:
        return None
    return status("VmRSS")


def status(key: str) -> int | None:
    """Read a size of this process from the kernel; None where it does not say."""
    return kibibytes(PROCESS / "status", key)


def available(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return kibibytes(Path("/proc/meminfo"), "MemAvailable")


def kibibytes(file: Path, key: str) -> int | None:
    """Find a line ``key: 12 kB`` and return its bytes."""
    with contextlib.suppress(OSError):
        for line in file.read_text("ascii", "replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
