"""The command around the tuner: what it is asked for, and processes of its own that are killed, or meet each other."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tuned_runs import FAKES, Run, running

from longspan.autotune import folders, table
from longspan.autotune.journal import place
from longspan.cli.page import Refused
from longspan.cli.tune import Asked, crew, seconds, tune
from longspan.cli.tune_lock import alone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and limits of Linux")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Run]]:
    yield from running(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(("text", "meant"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("7", 7)])
def test_budgets_are_read(text: str, meant: float) -> None:
    assert seconds(text) == meant


@pytest.mark.parametrize("text", ["", "m", "-3s", "five", "nan", "inf", "3d", "5ms", "1hm", "0s", "1_0"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="budget must be a time"):
        seconds(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kernels": ("nobody",)}, "kernel must be one of plain"),
        ({"arch": "sm_90"}, "--compile-only"),
        ({"arch": "sm_1", "compile_only": True}, "arch must be one of sm_80"),
        ({"clock": "longspan.autotune.clock:Wall"}, "only interpreted"),
        ({"clock": "no_such_module:Clock"}, "nothing can be measured here"),
        ({"png": Path("gains.gif")}, "ends in .png"),
        ({"png": Path("no such folder") / "gains.png"}, "a folder that exists"),
        ({"sources": ("fake_kernels:NOTHING",)}, "nothing to tune"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(run: Callable[..., Run], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        run("PLAIN", **settings)


def test_a_user_without_a_home_is_told_what_to_set(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object, **__: object) -> Path:
        msg = "could not determine the home directory"
        raise RuntimeError(msg)

    monkeypatch.delenv(folders.VARIABLE)
    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    with pytest.raises(Refused, match=folders.VARIABLE):
        run("PLAIN")


def test_a_damaged_journal_is_named_and_tables_go_on_serving(run: Callable[..., Run], tmp_path: Path) -> None:
    run("PLAIN")
    place().write_bytes(b"no journal" * 1000)
    with pytest.raises(Refused, match="move it away to start anew"):
        run("PLAIN")
    (kept,) = (tmp_path / "results" / "tables").iterdir()
    assert len(table.read(kept)["rows"]) == 3


@pytest.mark.parametrize("folder", ["/proc/self", "a file"])
def test_a_folder_that_cannot_be_written_to_is_named(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(folders.VARIABLE, folder if folder.startswith("/") else str(tmp_path / folder))
    with pytest.raises(Refused, match=folders.VARIABLE):
        run("PLAIN")


# What survives whom.

MAIN = """
import sys
from longspan.cli import tune
from longspan.cli.page import Refused
tune.triton_version = lambda: "3.6.0"
try:
    code = tune.tune(tune.Asked(
        sources=(sys.argv[1],), gate="fake_kernels:gate", clock="fake_kernels:Scripted",
        compiler="fake_kernels:Compiler", as_json=True, budget=60.0, workers=1))
except Refused as refusal:
    print(refusal)
    code = 2
sys.exit(code)
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command on fakes as a process of its own, which ends with the test."""
    found = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    processes: list[subprocess.Popen[str]] = []

    def start(source: str = "fake_kernels:SLOW") -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(  # noqa: S603 - our own source
                [sys.executable, "-c", MAIN, source], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": found, folders.VARIABLE: str(tmp_path), "TMPDIR": str(tmp_path)},
            )
        )  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def trials(folder: Path) -> dict[str, int]:
    """Count the trials of a journal by status."""
    path = next(folder.glob("*.sqlite3"), None)
    if path is None:
        return {}
    store = sqlite3.connect(path)
    try:
        return dict(store.execute("SELECT status, count(*) FROM trial GROUP BY 1").fetchall())
    except sqlite3.OperationalError:  # its tables are not there yet
        return {}
    finally:
        store.close()


def test_a_tuner_that_is_killed_loses_at_most_the_choice_in_flight(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    before = 0
    for _ in range(3):
        process = started()
        end = time.monotonic() + 60
        while trials(tmp_path).get("raced", 0) < before + 2 and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counted = trials(tmp_path)
        assert counted["raced"] >= before + 2
        assert set(counted) <= {"raced", "started"}
        assert counted.get("started", 0) <= 1
        before = counted["raced"]
    process = started()
    out, _ = process.communicate(timeout=60)
    (key,) = json.loads(out)["keys"]
    assert (key["raced"], key["choice"]["cost"]) == (12, 10)


def test_a_gpu_is_locked_for_everybody_and_its_kind_in_one_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "mine"))
    with alone("GPU-1", "kind"):
        with pytest.raises(Refused, match="on a GPU of this kind"), alone("GPU-2", "kind"):
            pass
        with alone("GPU-2", "another kind"):
            pass
        monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "yours"))
        with pytest.raises(Refused, match="on this GPU"), alone("GPU-1", "kind"):
            pass
    with alone("GPU-1", "kind"):  # free again
        pass


@pytest.mark.parametrize(
    ("cores", "memory", "alone", "count"),
    [(1, None, False, 1), (2, None, False, 2), (4, None, False, 3), (16, None, False, 14), (16, None, True, 15),
     (16, 5 << 30, False, 5), (16, 1 << 20, False, 1), (384, 1 << 40, False, 64)],
)  # fmt: skip
def test_compile_workers_are_as_many_as_cores_and_memory_bear(
    cores: int, memory: int | None, alone: bool, count: int
) -> None:
    assert crew(cores, memory, alone=alone) == count


def test_a_second_tuner_of_a_gpu_is_refused(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    first = started("fake_kernels:HANGING")
    end = time.monotonic() + 60
    while not trials(tmp_path).get("raced"):
        assert time.monotonic() < end
        time.sleep(0.02)
    out, _ = (second := started()).communicate(timeout=60)
    assert second.returncode == 2
    assert "another tuner measures on a GPU of this kind" in out
    first.kill()
    first.communicate()
    out, _ = started("fake_kernels:PLAIN").communicate(timeout=60)  # the lock died with its holder
    assert json.loads(out)["ok"]


def test_kernels_of_other_machines_are_named_in_a_line(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    del run  # for its folder
    sources = ("fake_kernels:PLAIN", "fake_kernels:NOTHING")
    assert tune(Asked(**{**FAKES, "as_json": False, "sources": sources})) == 0
    assert "nothing: nothing to tune on sm_90\n" in capsys.readouterr().out
