"""The servant of a compile worker: a launch of a family, compiled for a GPU that need not be there.

A stand-in for Triton's driver names the target, so that a launch goes through Triton's own specialisation, with the
cache key that a launch on the device will look up; and launches are recorded in place of being made.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

from .family import Case, families
from .lookup import override
from .resources import resources

USUAL: Final = 108  # multiprocessors of a device of which only the architecture is known


class Offline:
    """As much of a driver of Triton as compiling takes."""

    def __init__(self, backend: str, arch: int | str, lanes: int) -> None:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - a worker alone compiles

        self.target = GPUTarget(backend, arch, lanes)

    def get_current_target(self) -> Any:
        """Return the target."""
        return self.target

    def get_current_device(self) -> int:
        """Return the one device that there is not."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:  # noqa: ARG002 - Triton's signature
        """Return a stream that nothing is launched on."""
        return 0

    def set_current_device(self, device: int) -> None:
        """Take any device for current."""

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:  # noqa: ARG002 - Triton's signature
        """Return the compute capability; AMD's are all taken for new."""
        return divmod(self.target.arch, 10) if isinstance(self.target.arch, int) else (9, 4)

    def get_active_torch_device(self) -> Any:
        """Return the device on which launches find their tensors here."""
        import torch  # noqa: PLC0415 - a worker alone compiles

        return torch.device("cpu")


class Compiler:
    """Compiles choices of families.

    Args:
        sources: Import strings of sequences of families.
    """

    def __init__(self, sources: list[str]) -> None:
        self.families, self.aimed = families(sources), None

    def aim(self, target: list[Any], multiprocessors: int) -> None:
        """Take a GPU for the current one: its backend, architecture and lanes, and how many multiprocessors it has."""
        import torch  # noqa: PLC0415 - a worker alone compiles
        from triton.runtime import driver  # noqa: PLC0415

        stand_in: Any = Offline(*target)
        driver.set_active(stand_in)
        about: Any = SimpleNamespace(multi_processor_count=multiprocessors or USUAL)
        torch.cuda.get_device_properties = lambda *_: about  # launches may ask
        self.aimed = target

    def compile(
        self, family: str, case: dict[str, Any], choice: dict[str, Any], target: list[Any], multiprocessors: int
    ) -> dict[str, Any]:
        """Compile what one launch launches; the resources of its hungriest kernel, and the seconds spent."""
        begin = time.monotonic()
        if self.aimed != target:
            self.aim(target, multiprocessors)
        owner = self.families[family]
        with recorded() as kernels, override({family: choice}):
            owner.prepare(Case(**case), "cpu", False)()  # noqa: FBT003 - nothing is filled in
        if not kernels:
            msg = f"preparing {family} launched no kernel that Triton compiled"
            raise RuntimeError(msg)
        used = [resources(kernel) for kernel in kernels]
        most = {name: max(one.get(name, 0) for one in used) for name in used[0]}
        return {"resources": most, "seconds": time.monotonic() - begin}


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """Compile what is launched, launch nothing, and collect what was compiled."""
    from triton.runtime.jit import JITFunction  # noqa: PLC0415 - a worker alone compiles

    kernels: list[Any] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001 - it is always true
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)
        return kernel

    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run = launch
