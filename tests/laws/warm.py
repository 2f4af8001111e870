"""Compile beforehand what the problems of `longspan.laws.variants` launch, in parallel, without touching a GPU.

``python -m longspan.laws.warm sm_90`` fills Triton's cache on disk, from which a run of the laws on such a GPU loads.
Each law is drawn in a process of its own. They share variants: whoever first creates the file that is named after one
compiles it.
"""

import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from hypothesis import HealthCheck, Phase, given, settings

from longspan.backends import Unsupported, eager

from .calls import tensors
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
                back = [x for x in tensors((launching(*args, **kwargs),)) if x.requires_grad]
                leaves = [x for x in tensors((args, kwargs)) if x.requires_grad]
                if back:
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
            while children:  # one compile at a time for each law: there are as many laws at a time as processors
                os.waitpid(children.pop(), 0)
            child = os.fork()
            if child == 0:
                finish(lambda: run(kernel, *args, **{**kwargs, "warmup": True}))
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


def finish(work: Callable[[], object]) -> NoReturn:
    """Do what a forked process is for, and end it, whatever happens: it must not go on as its parent."""
    status = 1
    try:
        work()
        status = 0
    except Exception:  # noqa: BLE001 - it is printed, and the status says so
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def forked(law: str, examples: int, home: Path) -> int:
    """Warm a law in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        finish(lambda: sys.stdout.write(f"{law}: {dict(kinds(law, examples, home))}\n"))
    return child


def main() -> None:
    """Warm all laws, or one."""
    import triton  # noqa: PLC0415 - after TRITON_INTERPRET was looked at
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    target, *rest = sys.argv[1:]
    machine = TARGETS[target]
    torch.set_num_threads(1)
    pretend(triton, GPUTarget(machine.backend, machine.arch, machine.warp))
    if rest:
        law, examples, home = rest
        sys.stdout.write(f"{law}: {dict(kinds(law, int(examples), Path(home)))}\n")
        return
    failures, running, waiting = 0, 0, list(VARIANT_LAWS)
    with tempfile.TemporaryDirectory() as home:
        while waiting or running:
            if waiting and running < (os.cpu_count() or 1):
                forked(waiting.pop(0), EXAMPLES, Path(home))
                running += 1
            else:
                failures += os.wait()[1] != 0
                running -= 1
        total = Counter(file.name.split("-")[0] for file in Path(home).iterdir())
    sys.stdout.write(f"variants: {dict(total)}\n")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
