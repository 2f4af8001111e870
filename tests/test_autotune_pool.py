"""A worker's death costs its job and nothing else."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longspan.autotune.pool import Outcome, Pool, every

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and limits of Linux")
SOURCES: dict[str, Any] = {"sources": []}


def jobs(*ways: str, seconds: float = 30.0, **settings: Any) -> dict[Any, Outcome]:
    """Have each way of compiling tried, in workers that are `fake_kernels.Compiler`; what hangs for so many seconds."""
    with Pool("fake_kernels:Compiler", SOURCES, **{"count": 2, **settings}) as pool:
        for at, way in enumerate(ways):
            allowed = seconds if way == "hangs" else 30.0
            pool.submit((at, way), "compile", allowed, family="f", case={}, choice={"compile": way})
        return {outcome.tag: outcome for outcome in every(pool)}


def test_each_outcome_is_that_of_its_own_job() -> None:
    ways = ["well", "aborts", "well", "raises", "aborts", "well", "spills"]
    found = jobs(*ways)
    assert [(tag[1], one.status) for tag, one in sorted(found.items())] == [
        ("well", "ok"), ("aborts", "crash"), ("well", "ok"), ("raises", "error"), ("aborts", "crash"), ("well", "ok"),
        ("spills", "ok"),
    ]  # fmt: skip
    abort = found[1, "aborts"]
    assert abort.message == "its process died of SIGABRT"
    assert "LLVM ERROR: Cannot select" in abort.printed
    assert (found[3, "raises"].kind, found[3, "raises"].message) == ("ValueError", "Expected a power of two")
    assert found[6, "spills"].value["resources"]["stack"] == 512


def test_a_job_that_hangs_is_ended_and_the_others_go_on() -> None:
    begin = time.monotonic()
    found = jobs("hangs", "well", "hangs", "well", seconds=1.0)
    assert [one.status for _, one in sorted(found.items())] == ["timeout", "ok", "timeout", "ok"]
    assert found[0, "hangs"].message == "it did not end within 1 s"
    assert time.monotonic() - begin < 20


def test_a_worker_that_hangs_up_and_lives_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.autotune.pool.GRACE", 1.0)
    found = jobs("hangs up", "well", count=1)
    assert [one.status for _, one in sorted(found.items())] == ["crash", "ok"]
    assert found[0, "hangs up"].message == "it closed its pipe and went on running"


def test_workers_leave_no_core_and_find_no_module_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resource.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with Pool("fake_kernels:Compiler", SOURCES) as pool:
        pool.submit(1, "compile", 30, family="f", case={}, choice={})
        while pool.processes and not pool.processes[0].ready:
            pool.take()
        limits = Path(f"/proc/{pool.processes[0].popen.pid}/limits").read_text("ascii")
        (found,) = every(pool)
    assert found.status == "ok"
    assert re.search(r"Max core file size +0 +0 ", limits)


def test_a_job_that_wants_too_much_memory_fails_alone() -> None:
    found = jobs("eats memory", "well", count=1, memory=256 << 20)
    assert [one.status for _, one in sorted(found.items())] == ["error", "ok"]
    assert found[0, "eats memory"].kind == "MemoryError"


def test_a_worker_that_is_killed_from_outside_costs_its_job() -> None:
    with Pool("fake_kernels:Compiler", SOURCES) as pool:
        pool.submit("first", "compile", 60, family="f", case={}, choice={"seconds": 60})
        while not pool.processes[0].job:
            pool.take()
        os.kill(pool.processes[0].popen.pid, signal.SIGKILL)
        pool.submit("second", "compile", 60, family="f", case={}, choice={})
        found = {one.tag: one for one in every(pool)}
    assert (found["first"].status, found["first"].message) == ("crash", "its process died of SIGKILL")
    assert found["second"].status == "ok"


def test_a_servant_that_cannot_start_says_why() -> None:
    with Pool("no_such_module:Thing") as pool:
        pool.submit(1, "compile", 10)
        (found,) = every(pool)
    assert found.status == "error"
    assert "no_such_module:Thing" in found.message


def test_closing_a_pool_leaves_no_process_behind() -> None:
    with Pool("fake_kernels:Compiler", SOURCES, count=2) as pool:
        for at in range(4):
            pool.submit(at, "compile", 60, family="f", case={}, choice={"seconds": 60})
        while not all(process.job for process in pool.processes):
            pool.take()
        pids = [process.popen.pid for process in pool.processes]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


PARENT = """
import time
from longspan.autotune.pool import Pool
pool = Pool("fake_kernels:Compiler", {"sources": []})
pool.submit(1, "compile", 600, family="f", case={}, choice={"compile": "hangs"})
while not pool.processes[0].job:
    pool.take()
print(pool.processes[0].popen.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it is gone, or goes just now
        return False


def test_workers_die_with_a_coordinator_that_is_killed(tmp_path: Path) -> None:
    found = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    parent = subprocess.Popen(  # noqa: S603 - our own source
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": found},
    )  # fmt: skip
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it lives
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while alive(worker):
        assert time.monotonic() < end, "the worker lives on"
        time.sleep(0.05)
