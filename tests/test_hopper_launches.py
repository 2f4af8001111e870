"""What the kernels of `hopper` do beside computing, on a GPU: all of their output and no more, the same each time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captured import captured
from poisoned import copied, poisoned, same

from longspan.laws.kernel_cases import HOPPER, Case, attention

hopper = pytest.importorskip("longspan.backends.hopper", exc_type=ImportError)
pytestmark = pytest.mark.skipif(hopper.unavailable() is not None, reason=str(hopper.unavailable()))
LONG = 4100  # tokens: with it there are more tiles of queries than a GPU has multiprocessors

WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
CASES = HOPPER | {
    f"attention {d}/{e}, long": attention(d, e, torch.bfloat16, tokens=LONG, deterministic=True) for d, e in WIDTHS
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@every_case
def test_all_of_the_output_is_written_and_nothing_else(case: Case) -> None:
    run = case(hopper, "cuda")
    expected = copied(run)
    with poisoned() as mode:
        found = run()
    assert mode.rooms
    assert same(found, expected)


@every_case
def test_a_thousand_launches_give_the_same_bits(case: Case) -> None:
    run = case(hopper, "cuda")
    expected = copied(run)
    for _ in range(999):
        assert same(run(), expected)


@every_case
def test_a_captured_graph_replays(case: Case) -> None:
    run = case(hopper, "cuda")
    expected = copied(run)
    graph, found = captured(run)
    for _ in range(3):  # what a launch counts with must begin anew each time
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert same(found, expected)


@every_case
def test_two_streams_do_not_meet(case: Case) -> None:
    """Launches that overlap on two streams share nothing, least of all the counter of tiles."""
    run = case(hopper, "cuda")
    expected = copied(run)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(20):
        for stream in streams:
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                results.append(run())
    torch.cuda.synchronize()
    assert all(same(found, expected) for found in results)


# A barrier that nobody passes, which is how a wrong schedule of warps shows.
STUCK = """
import torch
from longspan.backends.hopper.gluon import gl, gluon, mbarrier

@gluon.jit
def stuck_kernel():
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.wait(bar, 0)

def test_that_hangs():
    stuck_kernel[(1,)](num_warps=4)
    torch.cuda.synchronize()

def test_that_follows():
    pass
"""


def test_a_barrier_that_nobody_passes_is_a_failed_test(tmp_path: Path) -> None:
    file = tmp_path / "test_stuck.py"
    file.write_text(STUCK)
    watch = ["-o", "faulthandler_timeout=20", "-o", "faulthandler_exit_on_timeout=true"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *watch,
        "--rootdir",
        str(tmp_path),
        str(file),
    ]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - our own source
    assert child.returncode != 0
    assert "test_that_hangs" in child.stderr + child.stdout
