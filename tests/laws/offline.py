"""Compile the kernels of `flash` for a machine that is not here, and read what each needs of it.

``python -m longspan.laws.offline sm_90 [case …]`` prints one JSON object per kernel. Every compile runs in a process of
its own, forked from this one: an LLVM that aborts, or never ends, costs one kernel and is reported by its name.
TRITON_INTERPRET must not be set.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch

from .kernel_cases import CASES, LARGE
from .kernels import FLASH, launches

KIB: Final = 1024
LONGEST: Final = 180  # seconds of one compile
AT_ONCE: Final = os.cpu_count() or 2  # compiles
PROCESSORS: Final = 132  # of every pretended machine: how many programs would fill it


class Target(NamedTuple):
    """A machine.

    Attributes:
        backend: ``cuda`` or ``hip``.
        arch: Triton's name of it.
        warp: Lanes that run together.
        shared: Bytes of shared memory that one program may have.
        large: Whether the large cases are compiled for it, too.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    large: bool = False


# Shared memory of a block: CUDA C++ Programming Guide, Table 30; AMD CDNA 3 and CDNA 4 ISA, Local Data Share.
TARGETS: Final = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB),
    "sm_89": Target("cuda", 89, 32, 99 * KIB, large=True),
    "sm_90": Target("cuda", 90, 32, 227 * KIB, large=True),
    "sm_100": Target("cuda", 100, 32, 227 * KIB),
    "sm_120": Target("cuda", 120, 32, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB, large=True),
    "gfx950": Target("hip", "gfx950", 64, 160 * KIB),
}


class Compile(NamedTuple):
    """A compile that is under way."""

    kernel: str
    case: str
    process: int
    results: Any  # file
    start: float


def compile_all(name: str, cases: list[str]) -> Iterator[dict[str, Any]]:
    """Compile what cases launch for a target; yield what each kernel needs, or how its compile ended."""
    import triton  # noqa: PLC0415 - and here, after TRITON_INTERPRET was looked at
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    target = TARGETS[name]
    pretend(triton, GPUTarget(target.backend, target.arch, target.warp))
    running: list[Compile] = []
    done: list[dict[str, Any]] = []
    case = ""

    def fork(run: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        while len(running) >= AT_ONCE:
            reap(running, done)
        results = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when it was read
        process = os.fork()
        if process == 0:
            try:
                found = needs(run(kernel, *args, **{**kwargs, "warmup": True}), target)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this kernel
                found = {"ended": f"{type(error).__name__}: {error.__cause__ or error}"}
            json.dump(found, results)
            results.flush()
            os._exit(0)
        running.append(Compile(kernel.fn.__name__, case, process, results, time.monotonic()))
        return None

    flash = import_module(FLASH)
    with launches(instead=fork):
        for case in cases:
            {**CASES, **LARGE}[case](flash, "cpu")()
            yield from done
            done.clear()
    while running:
        reap(running, done)
    yield from done


class Driver:
    """What Triton asks of a machine's driver before it launches."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        """Be the target."""
        return self.target

    def get_current_device(self) -> int:
        """Be the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        """Be the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Be where the tensors are."""
        return torch.device("cpu")


def pretend(triton: Any, target: Any) -> None:
    """Make Triton, and the checks of every module, take this CPU's tensors for those of the target."""
    triton.runtime.driver.set_active(Driver(target))
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=PROCESSORS)
    import_module(FLASH)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{FLASH}.") and hasattr(module, "serve"):
            vars(module)["serve"] = lambda *_: None


def reap(running: list[Compile], done: list[dict[str, Any]]) -> None:
    """Wait for some compile to end, or end one that takes too long."""
    for one in running:
        process, status = os.waitpid(one.process, os.WNOHANG)
        if process == 0 and time.monotonic() - one.start > LONGEST:
            os.kill(one.process, signal.SIGKILL)
            process, status = os.waitpid(one.process, 0)
        if process:
            running.remove(one)
            one.results.seek(0)
            text = one.results.read()
            one.results.close()
            found = json.loads(text) if text else {"ended": os.waitstatus_to_exitcode(status)}
            done.append({"kernel": one.kernel, "case": one.case, **found})
            return
    time.sleep(0.02)


def needs(compiled: Any, target: Target) -> dict[str, int]:
    """Registers of a lane, bytes of stack of a lane (spills lie there), bytes of shared memory of a program."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        assert compiled.asm["hsaco"]

        def note(key: str) -> int:
            return int(re.findall(rf"\.{key}:\s*(\d+)", text)[-1])

        return {
            "registers": note("vgpr_count"),  # the accumulation registers included
            "stack": note("private_segment_fixed_size"),
            "shared": max(compiled.metadata.shared, note("group_segment_fixed_size")),
        }
    from triton import knobs  # noqa: PLC0415

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listed = subprocess.run(  # noqa: S603 - Triton's own tool, on what it compiled
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed)}
    return {
        "registers": used["REG"], "stack": used["STACK"] + used["LOCAL"], "shared": compiled.metadata.shared,
    }  # fmt: skip


def main() -> None:
    """Compile for the target, and of the cases, that the command line names: all of them by default."""
    name, *cases = sys.argv[1:]
    chosen = cases or [*CASES, *(LARGE if TARGETS[name].large else ())]
    torch.set_num_threads(1)
    for result in compile_all(name, chosen):
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
