"""The attention kernels of `flash` compile for machines that are not here, and fit their shared memory."""

import os
import subprocess
import sys

import pytest

# The launches of every kernel, compiled for a machine that is not there; an aborting compiler kills a child.
OFFLINE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
backend, arch, limit, *problems = sys.argv[1:]
target = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
class Driver:
    get_current_target = lambda self: target
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")
triton.runtime.driver.set_active(Driver())
from longspan.backends.flash import backward, forward, launch
from longspan.backends.flash.lowering import lower
from longspan.spec.masks import causal, documents, window
compiled = []
class Offline:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **kwargs: compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))
for module in (forward, backward):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Offline(getattr(module, name)))
heads = lambda d, dtype: torch.zeros(1, 64, 2, d, dtype=dtype).transpose(1, 2)
two = torch.zeros(2)
PROBLEMS = {
    "plain": (128, 128, torch.bfloat16, causal(), None, None, None),
    "wide": (256, 256, torch.bfloat16, causal(), None, None, None),
    "exact": (192, 128, torch.float32, causal(), None, None, None),
    "rich": (80, 96, torch.float16, documents([30, 34]) & causal() & window(7, keep_first=3), two, two, 2.0),
}
for problem in problems:
    d, e, dtype, mask, sink, alibi, softcap = PROBLEMS[problem]
    q, v = heads(d, dtype), heads(e, dtype)
    seen = lower(mask, 1, 64, 64, q_offset=None, k_offset=0, device=q.device)
    call = launch.Call(sink, alibi, seen.rows, seen.sequences, tuple(seen.interval), 0.1, softcap, dtype)
    out, lse = forward.forward(call, q, q, v)
    backward.backward(call, q, q, v, out, lse, out, lse)
for kernel in compiled:
    assert kernel.asm["cubin" if backend == "cuda" else "hsaco"]
    assert kernel.metadata.shared <= int(limit), f"{kernel.metadata.name} needs {kernel.metadata.shared} bytes"
    print(kernel.metadata.name, kernel.metadata.shared)
"""
KIB = 1024


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(("cuda", 80, 99 * KIB, "rich"), id="sm_80"),  # with the shared memory of sm_86 and sm_89
        pytest.param(("cuda", 90, 227 * KIB, "plain", "rich", "wide"), id="sm_90"),
        pytest.param(("cuda", 100, 227 * KIB, "plain"), id="sm_100"),
        pytest.param(("hip", "gfx942", 64 * KIB, "rich"), id="gfx942"),
    ],
)
def test_every_attention_kernel_compiles_without_a_gpu_and_fits(target: tuple[str, int | str, int, str]) -> None:
    problems = len(target) - 3
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", OFFLINE, *map(str, target)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    names = [line.split()[0] for line in child.stdout.splitlines()]
    expected = ["backward_keys_kernel", "backward_queries_kernel", "forward_kernel", "prepare_kernel"]
    assert sorted(names) == sorted(expected * problems)
