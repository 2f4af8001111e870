"""The rotary kernels of `flash` compile for machines that are not here: NVIDIA sm_80 and sm_90, AMD gfx942."""

import os
import subprocess
import sys

import pytest

# The launches of every rotary kernel, compiled for a machine that is not there; an aborting compiler kills a child.
OFFLINE = """
import sys, torch, triton
from importlib import import_module
from triton.backends.compiler import GPUTarget
from longspan import spec
backend, arch = sys.argv[1:]
target = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
class Driver:
    get_current_target = lambda self: target
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_active_torch_device = lambda self: torch.device("cpu")
triton.runtime.driver.set_active(Driver())
compiled = []
class Offline:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **kwargs: compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))
kernels = [import_module("longspan.backends.flash." + name) for name in ("rope_kernel", "append", "merge")]
rope, append, merge = kernels
for module, name in zip(kernels, ("rotate_kernel", "append_kernel", "merge_kernel")):
    setattr(module, name, Offline(getattr(module, name)))
heads = lambda h, d, dtype: torch.empty(2, 64, h, d, dtype=dtype).transpose(1, 2)
speed, axis, factor = spec.inv_freq(96), torch.zeros(48, dtype=torch.int64), torch.ones(2, dtype=torch.float64)
for dtype, interleaved, inv_freq, rows, axes in (
    (torch.bfloat16, False, speed, None, None), (torch.float16, True, speed, None, axis),
    (torch.float32, True, torch.stack([speed, speed]), factor, axis),
):
    x = [heads(4, 128, dtype), heads(1, 96, dtype)]
    position = torch.zeros(3, 2, 64, dtype=torch.int64) if axes is not None else torch.arange(64)
    rope.launch(x, [one.clone() for one in x], position, inv_freq, rows, axes, 1.0, interleaved, interleaved)
    k, v = (one[0].transpose(0, 1) for one in (x[0], heads(4, 80, dtype)))
    cache, slot = torch.empty(9, 4, 16, 128, dtype=dtype), torch.arange(64)
    append.write_(k, v, cache, cache[..., :80], slot, slot[:, None], speed, None, None, 1.0, interleaved)
    merge.launch((x[0],) * 3, (torch.empty(2, 4, 64),) * 3, factor.float().expand(2, 4, 2)[..., 0], dtype)
for kernel in compiled:
    assert kernel.asm["cubin" if backend == "cuda" else "hsaco"]
print(len(compiled), "compiled")
"""


@pytest.mark.parametrize("target", ["cuda 80", "cuda 90", "hip gfx942"])
def test_every_rotary_kernel_compiles_without_a_gpu(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", OFFLINE, *target.split()],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "9 compiled"
