"""What every kernel of `flash` does beside computing: it writes all of its output and nothing else, the same each time.

The cases are those of `longspan.laws.kernel_cases`, on whichever device this machine has; graphs and hundreds of
launches are for a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch
from captured import captured
from poisoned import GUARD, copied, poisoned, same

from longspan.backends import flash
from longspan.laws.kernel_cases import CASES, LARGE, Case
from longspan.laws.kernels import kernels, launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(flash.unavailable() is not None, reason=str(flash.unavailable()))
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
EVERY = {**CASES, **LARGE} if DEVICE == "cuda" else CASES
every_case = pytest.mark.parametrize("case", EVERY.values(), ids=list(EVERY))


@every_case
def test_all_of_the_output_is_written_and_nothing_else(case: Case) -> None:
    run = case(flash, DEVICE)
    first = run()
    expected = [x.clone() for x in first]
    with poisoned() as mode:
        found = run()
    assert mode.rooms or found is first  # what is written in place is no fresh memory
    assert same(found, expected)


def test_poison_is_seen_and_guards_are_guarded() -> None:
    with poisoned() as mode:
        x = torch.empty(3, 5, device=DEVICE)
        y = x.new_empty(7, dtype=torch.bfloat16)
        z = torch.empty_like(x.transpose(0, 1))
    assert all(bool(one.isnan().all()) for one in (x, y, z))
    assert z.stride() == (1, 5)
    mode.rooms[0][0][GUARD - 1] = 0
    with pytest.raises(AssertionError, match="60 bytes"):
        mode.assert_intact()


@on_gpu
def test_every_kernel_is_launched_by_some_case() -> None:
    with launches() as names:
        for case in CASES.values():
            case(flash, DEVICE)()
    assert set(names) == set(kernels())


@on_gpu
@every_case
def test_a_hundred_launches_give_the_same_bits(case: Case) -> None:
    run = case(flash, DEVICE)
    expected = copied(run)
    for _ in range(99):
        assert same(run(), expected)


@on_gpu
@every_case
def test_a_captured_graph_replays(case: Case) -> None:
    run = case(flash, DEVICE)
    first = run()
    expected = [x.clone() for x in first]
    graph, found = captured(run)
    for x in found:
        x.fill_(0.0 if found is first else torch.nan)  # caches, which are written in part, were full of zeros
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, expected)


# In a process of its own, where nothing is interpreted: every launch is left out, and what is around them is watched.
UNWATCHED = """
import torch, triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from longspan.backends import flash
from longspan.laws import kernel_cases, kernels, offline
offline.pretend(triton, GPUTarget("cuda", 90, 32))
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.is_nonzero}
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITING, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))
for name, case in kernel_cases.CASES.items():
    run = case(flash, "cpu")
    with kernels.launches(instead=lambda *_, **__: None) as names, Watch():
        run()
    assert names, name
try:
    with Watch():
        torch.ones(()).item()
except AssertionError:
    print("nothing waits")
"""


def test_no_call_waits_for_the_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", UNWATCHED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.stdout.strip() == "nothing waits", child.stderr[-3000:]
