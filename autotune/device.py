"""Identity of a GPU and of the compiler: what a choice may depend on, and no product name.

Two products with the same silicon share their tables; a product's name is only recorded.
"""

from dataclasses import dataclass
from typing import Any, Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
# Bytes of shared memory that one program may have, by architecture (CUDA C++ Programming Guide, table of compute
# capabilities; AMD's instruction set manuals): what to hold a compilation to where there is no such GPU to ask.
SHARED: Final = {
    "sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_87": 163 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB,
    "sm_100": 227 * KIB, "sm_103": 227 * KIB, "sm_110": 227 * KIB, "sm_120": 99 * KIB, "sm_121": 99 * KIB,
    "gfx90a": 64 * KIB, "gfx942": 64 * KIB, "gfx950": 160 * KIB,
}  # fmt: skip
MOST_THREADS: Final = 1024
REGISTERS: Final = 65536  # of a multiprocessor, as of every architecture above
COLUMNS: Final = 512  # of Blackwell's tensor memory


@dataclass(frozen=True, kw_only=True)
class Device:
    """What choices depend on.

    Attributes:
        arch: ``sm_90``, ``gfx942``, …
        multiprocessors: How many there are; 0 where only the architecture is known.
        l2: Bytes of the last-level cache.
        shared: Bytes of shared memory that a program may have.
        name: The product; recorded and never compared.
    """

    arch: str
    multiprocessors: int
    l2: int
    shared: int
    name: str = ""

    @property
    def slug(self) -> str:
        """Name of the device's tables: ``sm_90-132sm-50mb-227kb``."""
        return f"{self.arch}-{self.multiprocessors}sm-{self.l2 // MIB}mb-{self.shared // KIB}kb"

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 64 if self.arch.startswith("gfx9") else 32

    @property
    def target(self) -> tuple[str, int | str, int]:
        """Backend, architecture and lanes, as the compiler takes them."""
        if self.arch.startswith("sm_"):
            return "cuda", int(self.arch.removeprefix("sm_")), 32
        return "hip", self.arch, self.lanes


def offline(arch: str) -> Device:
    """Describe an architecture of which no GPU is at hand.

    Raises:
        ValueError: For an architecture whose limits are not known.
    """
    if arch not in SHARED:
        msg = f"arch must be one of {', '.join(SHARED)}, got {arch!r}"
        raise ValueError(msg)
    return Device(arch=arch, multiprocessors=0, l2=0, shared=SHARED[arch])


def current(index: int | None = None) -> Device | None:
    """Describe a GPU, the current one by default; None where there is none."""
    import torch  # noqa: PLC0415 - a coordinator on a machine without a GPU does not need it

    if not torch.cuda.is_available():
        return None
    seen: Any = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    hip = torch.version.hip is not None
    arch = seen.gcnArchName.partition(":")[0] if hip else f"sm_{seen.major}{seen.minor}"
    shared = getattr(seen, "shared_memory_per_block_optin", 0) or SHARED.get(arch, 48 * KIB)
    return Device(
        arch=arch, multiprocessors=seen.multi_processor_count, l2=seen.L2_cache_size, shared=shared, name=seen.name
    )


def triton_version() -> str:
    """Version of the compiler; empty where there is none."""
    try:
        import triton  # noqa: PLC0415 - the spec, eager and sdpa do without
    except ImportError:
        return ""
    return triton.__version__


def minor(version: str) -> str:
    """Major and minor version, within which generated code is taken to stay alike."""
    return ".".join(version.split(".")[:2])


def illegal(resources: dict[str, Any], device: Device) -> str | None:
    """Say why a compiled kernel cannot be launched on a device, or None."""
    threads = device.lanes * int(resources.get("num_warps", 1))
    if resources.get("shared", 0) > device.shared:
        return f"it needs {resources['shared']} bytes of shared memory, and a program has {device.shared}"
    if threads > MOST_THREADS:
        return f"it has {threads} threads, and a program has at most {MOST_THREADS}"
    if device.arch.startswith("sm_") and resources.get("registers", 0) * threads > REGISTERS:
        return f"{threads} threads of {resources['registers']} registers exceed {REGISTERS}"
    if resources.get("tmem", 0) > COLUMNS:
        return f"it needs {resources['tmem']} columns of tensor memory, and there are {COLUMNS}"
    return None
