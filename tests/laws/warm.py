"""Compile beforehand what the problems of `longspan.laws.variants` launch, in parallel, without touching a GPU.

``python -m longspan.laws.warm sm_90`` fills Triton's cache on disk, from which a run of the laws on such a GPU loads.
Each law is drawn in a process of its own. They share variants: whoever first creates the file that is named after one
compiles it.
"""

import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from subprocess import run as spawn
from typing import Any, Final

import torch
from hypothesis import HealthCheck, Phase, given, settings

from longspan.backends import Unsupported, eager

from .kernels import FLASH, launches
from .offline import TARGETS, pretend
from .variants import VARIANT_LAWS

EXAMPLES: Final = 150  # of a law: after these, new variants are rare


class Shadow:
    """A backend whose results are those of the specification, after `flash` was asked to launch for the same call."""

    def __init__(self, flash: Any) -> None:
        self.flash = flash

    def __getattr__(self, name: str) -> Any:
        """Find an operation."""
        launching, exact = getattr(self.flash, name), getattr(eager, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            with suppress(Unsupported):
                result = launching(*args, **kwargs)
                found = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
                back = [x for x in found if x.requires_grad]
                if back:
                    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
                    torch.autograd.grad(back, leaves, [torch.zeros_like(x) for x in back], allow_unused=True)
            return exact(*args, **kwargs)

        return operation


def kinds(law: str, examples: int, home: Path) -> Counter[str]:
    """Draw problems of a law, and compile what they launch and nobody else has; count variants by kernel."""
    from triton.runtime.jit import compute_cache_key  # noqa: PLC0415 - after TRITON_INTERPRET was looked at

    seen: Counter[str] = Counter()
    children: list[int] = []

    def compile_once(run: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: x for name, x in kwargs.items() if name not in {"grid", "warmup"}}
        _, names, _, _, binder = kernel.device_caches[0]
        _, specialization, options = binder(*args, **{**given, "debug": False, "instrumentation_mode": ""})
        key = f"{kernel.fn.__name__} {compute_cache_key(names, specialization, options)}"
        with suppress(FileExistsError):
            (home / f"{kernel.fn.__name__}-{sha256(key.encode()).hexdigest()}").touch(exist_ok=False)
            seen[kernel.fn.__name__] += 1
            child = os.fork()
            if child == 0:
                run(kernel, *args, **{**kwargs, "warmup": True})
                os._exit(0)
            children.append(child)
        return None

    problems, check = VARIANT_LAWS[law].problems, VARIANT_LAWS[law].check

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(problems)
    def draw(problem: Any) -> None:
        check(Shadow(import_module(FLASH)), problem, "cpu")

    with launches(instead=compile_once):
        draw()
    for child in children:
        os.waitpid(child, 0)
    return seen


def main() -> None:
    """Warm all laws, each in a process, or one."""
    target, *rest = sys.argv[1:]
    if not rest:
        with tempfile.TemporaryDirectory() as home:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = [
                    [sys.executable, "-m", __spec__.name, target, law, str(EXAMPLES), home] for law in VARIANT_LAWS
                ]
                failed = sum(pool.map(lambda command: spawn(command, check=False).returncode != 0, commands))  # noqa: S603
            total = Counter(file.name.split("-")[0] for file in Path(home).iterdir())
            sys.stdout.write(f"variants: {dict(total)}\n")
        sys.exit(failed > 0)
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    machine = TARGETS[target]
    torch.set_num_threads(1)
    pretend(triton, GPUTarget(machine.backend, machine.arch, machine.warp))
    law, examples, home = rest
    sys.stdout.write(f"{law}: {dict(kinds(law, int(examples), Path(home)))}\n")


if __name__ == "__main__":
    main()
