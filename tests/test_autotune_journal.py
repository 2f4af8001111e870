"""A journal loses nothing that it acknowledged, and says in a sentence what is wrong with a file that is none."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longspan.autotune.journal import MAGIC, Journal, Unusable

KEY, CHOICE = {"width": 64}, {"tile": 16}


def filled(path: Path) -> tuple[Journal, int]:
    """Open a journal with one choice that was raced."""
    journal = Journal(path)
    scope = journal.scope("family", "digest", "device", "3.6")
    journal.compiled(scope, {}, CHOICE, "ok", resources={"registers": 32}, seconds=0.5)
    journal.start(scope, KEY, CHOICE)
    journal.finish(scope, KEY, CHOICE, "raced", worst=0.4, times=[1e-3, 2e-3])
    return journal, scope


def test_what_was_written_is_read_back_by_the_next_run(tmp_path: Path) -> None:
    journal, scope = filled(tmp_path / "deep" / "journal")
    journal.win(scope, KEY, CHOICE, worst=0.5, repeated=True, evidence={"us": 1000.0})
    journal.close()
    again = Journal(tmp_path / "deep" / "journal")
    assert again.scope("family", "digest", "device", "3.6") == scope
    assert again.scope("family", "changed", "device", "3.6") != scope
    key, choice = '{"width":64}', '{"tile":16}'
    assert again.compilations(scope)[("{}", choice)]["resources"] == {"registers": 32}
    assert again.trials(scope)[key, choice]["times"] == [1e-3, 2e-3]
    assert again.winners(scope)[key]["evidence"] == {"us": 1000.0}
    again.forget(scope)
    assert (again.trials(scope), again.winners(scope), len(again.compilations(scope))) == ({}, {}, 1)
    again.close()


def test_a_second_start_takes_back_no_acknowledged_result(tmp_path: Path) -> None:
    journal, scope = filled(tmp_path / "journal")
    journal.start(scope, KEY, CHOICE)
    assert journal.trials(scope)['{"width":64}', '{"tile":16}']["status"] == "raced"
    journal.close()


def test_what_a_killed_run_started_is_suspect(tmp_path: Path) -> None:
    journal, scope = filled(tmp_path / "journal")
    journal.start(scope, KEY, {"tile": 32})
    journal.start(scope, KEY, {"tile": 32})
    name = '{"width":64}', '{"tile":32}'
    assert (journal.trials(scope)[name]["status"], journal.trials(scope)[name]["attempts"]) == ("started", 2)
    journal.withdraw(scope, KEY, {"tile": 32})
    assert journal.trials(scope)[name]["attempts"] == 1
    journal.withdraw(scope, KEY, {"tile": 32})
    assert name not in journal.trials(scope)
    journal.close()


@pytest.mark.parametrize(
    "changed",
    [
        {"choice": {"tile": 32}},  # never tried
        {"key": {"width": 128}},
        {"repeated": False},
        {"worst": 1.5},  # over budget
    ],
)
def test_a_winner_needs_a_verification_of_its_own(tmp_path: Path, changed: dict[str, Any]) -> None:
    journal, scope = filled(tmp_path / "journal")
    settings = {"key": KEY, "choice": CHOICE, "worst": 0.5, "repeated": True, **changed}
    with pytest.raises(Unusable, match="constraint failed"):
        journal.win(scope, settings.pop("key"), settings.pop("choice"), **settings, evidence={})
    assert journal.winners(scope) == {}
    with pytest.raises(sqlite3.IntegrityError):
        journal.store.execute("INSERT INTO winner VALUES (?, '{}', '{}', 1, '{}', 0)", (scope,))
    journal.close()


def test_a_wrong_choice_cannot_be_written_as_raced(tmp_path: Path) -> None:
    journal, scope = filled(tmp_path / "journal")
    with pytest.raises(Unusable, match="constraint failed"):
        journal.finish(scope, KEY, CHOICE, "raced", worst=1.01, times=[1.0])
    journal.close()


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for contents in (b"hello" * 1000, b"SQLite format 3\0" + b"\0" * 4000):
        path.write_bytes(contents)
        with pytest.raises(Unusable, match="is no journal, or a damaged one"):
            Journal(path)
        assert path.read_bytes() == contents


def test_another_programs_database_and_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(Unusable, match="a database of another program"):
        Journal(path)
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA application_id = {MAGIC}")
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(Unusable, match="must be a journal of version 2, got 99"):
        Journal(path)


def test_a_journal_with_a_hole_is_named_as_damaged(tmp_path: Path) -> None:
    journal, scope = filled(tmp_path / "journal")
    for number in range(400):
        journal.start(scope, KEY, {"tile": number})
    journal.store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.close()
    contents = bytearray((tmp_path / "journal").read_bytes())
    contents[8192:16384] = random.Random(1).randbytes(8192)
    (tmp_path / "journal").write_bytes(contents)
    with pytest.raises(Unusable, match="move it away to start anew"):
        Journal(tmp_path / "journal").trials(scope)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    # Permission bits stop nobody who is root; a file where a folder should be, and /proc, stop everybody.
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/self")):
        with pytest.raises(Unusable, match="LONGSPAN_TUNE_DIR"):
            Journal(folder / "journal")


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path: Path) -> None:
    journal, scope = filled(tmp_path / "journal")
    journal.store.execute("PRAGMA max_page_count = 20")  # the file may grow no more than that
    written: list[int] = []

    def fill() -> None:
        while True:
            journal.start(scope, KEY, {"tile": len(written), "padding": "x" * 500})
            written.append(1)

    with pytest.raises(Unusable, match=r"disk is full.*free some space"):
        fill()
    journal.close()
    again = Journal(tmp_path / "journal")
    assert len(again.trials(scope)) == len(written) + 1 > 10
    again.close()


FULL = """
import sys
from pathlib import Path
from longspan.autotune.journal import Journal, Unusable
journal = Journal(Path(sys.argv[1]))
scope = journal.scope("f", "d", "v", "t")
print("open", flush=True)
try:
    for number in range(100_000):
        journal.start(scope, {}, {"number": number, "padding": "x" * 500})
        print(number, flush=True)
except Unusable as trouble:
    print("Unusable:", trouble)
"""


def child(code: str, *arguments: str, seconds: float, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the project where this one does; it is killed after so many seconds."""
    found = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    return subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=seconds, check=False,
        env={**os.environ, "PYTHONPATH": found}, **settings,
    )  # fmt: skip


def no_more_than(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, and tell it by an error and not by a signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_system_that_refuses_to_write_is_named(tmp_path: Path) -> None:
    process = child(FULL, str(tmp_path / "journal"), seconds=60, preexec_fn=lambda: no_more_than(1 << 20))
    lines = process.stdout.splitlines()
    assert "Unusable:" in lines[-1]
    assert "free some space" in lines[-1]
    acknowledged = [int(line) for line in lines[1:-1]]
    assert acknowledged
    kept(tmp_path / "journal", acknowledged[-1] + 1)


def kept(path: Path, least: int) -> int:
    """Open a journal after its writer's death, and see that all it acknowledged is there, in order, and no hole."""
    journal = Journal(path)
    scope = journal.scope("f", "d", "v", "t")
    count = len(journal.trials(scope))
    assert count >= least, f"{least} results were acknowledged, and {count} are there"
    assert journal.store.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    journal.close()
    return count


KILLED = """
import os, random, signal, sys
from pathlib import Path
from longspan.autotune.journal import Journal

path, count, draw = Path(sys.argv[1]), 0, random.Random(3)

def write(said):
    journal = Journal(path)
    scope = journal.scope("f", "d", "v", "t")
    # What is not raced was in flight when the last one died: it is tried again.
    number = sum(trial["status"] == "raced" for trial in journal.trials(scope).values())
    while True:
        journal.start(scope, {}, {"number": number})
        journal.finish(scope, {}, {"number": number}, "raced", worst=0.5, times=[1.0])
        number += 1
        os.write(said, b"%d\\n" % number)

for _ in range(100):
    heard, said = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(heard)
        write(said)
    os.close(said)
    with os.fdopen(heard, "rb", buffering=0) as replies:
        seen = replies.read(1)
        for _ in range(draw.randrange(40)):
            seen += replies.read(1)
        os.kill(process, signal.SIGKILL)
        seen += replies.readall() or b""
    os.waitpid(process, 0)
    acknowledged = int((seen[: seen.rfind(b"\\n") + 1].split() or [count])[-1])
    journal = Journal(path)
    trials = journal.trials(journal.scope("f", "d", "v", "t"))
    raced = sum(trial["status"] == "raced" for trial in trials.values())
    assert raced >= acknowledged, f"{acknowledged} results were acknowledged, and {raced} are there"
    assert len(trials) - raced <= 1, "more than the choice in flight was lost"
    assert journal.store.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    journal.close()
    count = max(count, acknowledged)
print(count)
"""


def test_a_coordinator_killed_100_times_loses_no_acknowledged_result(tmp_path: Path) -> None:
    # Forked from one light child: a hundred interpreters would take minutes, and the journal is what is tested.
    process = child(KILLED, str(tmp_path / "journal"), seconds=300)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 100
