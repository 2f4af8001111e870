"""A run of the tuner: who wins, who never does, and what survives whom. Kernels are those of `fake_kernels`."""

import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_kernels
import pytest
from tuned_runs import Run, running

from longspan.autotune import digest, folders, table
from longspan.autotune.journal import place
from longspan.autotune.pool import Pool, Process
from longspan.cli.page import Refused, console
from longspan.cli.tune import merge
from longspan.cli.tune_page import conclude_measured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and limits of Linux")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Run]]:
    yield from running(tmp_path, monkeypatch, capsys)


def gone(pool: Pool) -> None:
    """Take a pool's workers and whatever new ones would be made of."""
    pool.close()
    pool.servant = "no_such_module:Measurer"


def test_the_fastest_choice_wins_every_key_and_is_kept(run: Callable[..., Run], tmp_path: Path) -> None:
    done = run("PLAIN")
    assert (done.code, done.won) == (0, [80, 80, 80])
    assert all(1.24 < key["gain"] < 1.26 and key["raced"] == 4 for key in done.found["keys"])
    assert done.found["mean_gain"] == pytest.approx(1.25, rel=0.01)
    assert 0 < done.found["answered_seconds"] <= done.found["seconds"]
    (kept,) = (tmp_path / "results" / "tables").iterdir()
    rows = table.read(kept)["rows"]
    assert [row["choice"]["cost"] for row in rows] == [80, 80, 80]
    assert [cost["cost"] for cost, _ in rows[0]["finalists"]] == [80, 100]  # 90 and 300 were cut, the heuristic stays
    assert rows[0]["digest"] == digest.digest([fake_kernels.add])


def test_the_heuristic_stays_where_nothing_is_better_by_more_than_one_percent(run: Callable[..., Run]) -> None:
    done = run("CLOSE")
    assert (done.code, done.won) == (0, [1000])


def test_wrong_kernels_never_win_however_fast(run: Callable[..., Run]) -> None:
    done = run("WRONG")
    assert (done.code, done.won) == (1, [60])  # 1: a wrong choice is loud
    assert sorted(done.faults) == sorted([
        ("drops the tail", "wrong"), ("races", "wrong"), ("reads uninitialised memory", "wrong"), ("raises", "error"),
        ("repeats in other bits", "wrong"), ("forgets the sign", "wrong"),
    ])  # fmt: skip


def test_a_wrong_choice_comes_with_a_program_that_shows_it(run: Callable[..., Run]) -> None:
    done = run("WRONG")
    # Seen in its trial, in the final alone, and only with other options of the same key.
    for way in ("drops the tail", "repeats in other bits", "forgets the sign"):
        fault = next(one for one in done.found["faults"] if one["choice"]["way"] == way)
        program = fault["reproduce"].replace("print(", "shown = (")
        names: dict[str, Any] = {}
        exec(program, names)  # noqa: S102 - that it runs is what is promised
        assert names["shown"] == {"status": "wrong", "note": fault["message"]}


def test_a_winner_that_is_found_wrong_later_serves_no_longer(run: Callable[..., Run], tmp_path: Path) -> None:
    def condemn(where: str) -> None:
        with sqlite3.connect(place()) as journal:
            journal.execute(f"UPDATE trial SET status = 'wrong', worst = NULL WHERE {where}")  # noqa: S608 - from below
        journal.close()

    assert run("PLAIN").won == [80, 80, 80]
    condemn("choice LIKE '%80%'")
    assert run("PLAIN").won == [90, 90, 90]
    (kept,) = (tmp_path / "results" / "tables").iterdir()
    assert [row["choice"]["cost"] for row in table.read(kept)["rows"]] == [90, 90, 90]
    condemn("TRUE")
    assert run("PLAIN").won == [None, None, None]
    assert table.read(kept)["rows"] == []


def test_times_of_another_problem_are_none_of_this_one(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served() -> list[Any]:
        (kept,) = (tmp_path / "results" / "tables").iterdir()
        return [row["problem"]["size"] for row in table.read(kept)["rows"]]

    run("PLAIN")
    longer = replace(fake_kernels.case(), problem={"size": 32})
    monkeypatch.setattr("longspan.cli.tune.launched", lambda *_: {"plain": [longer]})
    done = run("PLAIN", model=Path("config.json"), context=32)
    assert (done.won, done.found["compiled"], served()) == ([80], 0, [32, 16, 16])
    with sqlite3.connect(place()) as journal:
        assert journal.execute("SELECT count(*) FROM trial").fetchone() == (16,)  # four choices of four problems
    journal.close()
    run("PLAIN")
    assert served() == [16, 16, 16]
    # Who was wrong on one problem of a key serves none of its launches.
    with sqlite3.connect(place()) as journal:
        changed = journal.execute(
            "UPDATE trial SET status = 'wrong', worst = NULL WHERE choice LIKE '%80%' AND key LIKE '%\"size\":32%'"
        )
        assert changed.rowcount == 1
    journal.close()
    run("PLAIN")
    assert served() == [16, 16]


def test_a_choice_that_takes_its_worker_down_is_tried_again_once_and_then_never(run: Callable[..., Run]) -> None:
    done = run("DEADLY")
    assert (done.code, done.won) == (0, [50])
    assert done.faults == [("faults", "crash"), ("faults", "poison")]
    assert "SIGSEGV" in done.found["faults"][0]["message"]
    again = run("DEADLY", fresh=False)
    assert (again.won, again.faults) == ([50], [])


def test_a_choice_that_leaves_the_device_unusable_costs_its_worker_and_no_other_choice(run: Callable[..., Run]) -> None:
    done = run("BREAKING")
    assert (done.code, done.won) == (0, [40])
    assert done.faults == [("breaks the device", "crash"), ("breaks the device", "poison")]
    assert "left the device unusable" in done.found["faults"][0]["message"]


def test_a_worker_that_made_wrong_numbers_is_replaced(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Process] = []
    start = Pool.start

    def counted(self: Pool) -> Process:
        process = start(self)
        if self.servant.endswith("Measurer"):
            started.append(process)
        return process

    monkeypatch.setattr(Pool, "start", counted)
    done = run("WRONG")
    assert len(started) == 1 + sum(status == "wrong" for _, status in done.faults)


def test_a_launch_that_hangs_is_ended_and_the_run_goes_on(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.autotune.tuner.TRIAL", 3.0)  # honest trials take milliseconds, of a busy machine more
    done = run("HANGING")
    assert (done.won, done.faults) == ([50], [("hangs", "timeout"), ("hangs", "poison")])


def test_what_does_not_compile_or_fit_is_out_and_what_spills_comes_last(run: Callable[..., Run]) -> None:
    compiled = run("COMPILED", compile_only=True)
    assert compiled.faults == [("aborts", "crash")]  # once, though two keys share it
    done = run("COMPILED")
    assert done.won == [20, 20]  # the one that spills: compiled codes are judged by their times alone
    assert done.faults == [("aborts", "crash")]  # once more: the machine may have been out of memory
    again = run("COMPILED")
    assert (again.found["compiled"], again.faults) == (0, [])
    assert [(key["out"], key["raced"], key["spilling"]) for key in done.found["keys"]] == [(3, 3, 1)] * 2
    with sqlite3.connect(place()) as journal:
        tried = journal.execute("SELECT choice FROM trial ORDER BY at").fetchall()
        assert "spills" in tried[-1][0]
        notes = dict(journal.execute("SELECT status, note FROM compilation").fetchall())
    journal.close()
    assert "1048576 bytes of shared memory" in notes["illegal"]
    assert notes["error"] == "ValueError Expected a power of two"
    assert run("COMPILED", fresh=True, compile_only=True).found["compiled"] == 2  # what failed, and not what did not


def test_a_run_goes_on_where_the_last_one_stopped(run: Callable[..., Run]) -> None:
    budget = 2.5
    while (raced := (first := run("SLOW", budget=budget)).found["keys"][0]["raced"]) == 0:
        budget *= 2  # the machine is busy
    assert 0 < raced < 12
    assert first.won != [None]  # a short budget has a winner, too
    second = run("SLOW")
    assert (second.found["keys"][0]["raced"], second.won) == (12, [10])
    assert second.found["compiled"] <= 12 - raced + 1
    third = run("SLOW")
    assert third.found["compiled"] == 0
    assert third.won == [10]
    assert run("SLOW", fresh=True).found["keys"][0]["raced"] == 12


def test_an_exhaustive_run_says_what_the_race_would_have_lost_and_draws(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    done = run("PLAIN", exhaustive=True, png=tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    assert all(0 <= key["regret"] < 0.01 for key in done.found["keys"])


def test_workers_that_do_not_come_up_end_the_run_and_no_choice(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused, match=r"a worker did not come up: .*no_such_module"):
        run("PLAIN", compiler="no_such_module:Compiler")
    assert run("PLAIN").won == [80, 80, 80]
    # A measuring worker that served once, and whose successor finds its device gone.
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "renew", gone)
        with pytest.raises(Refused, match=r"a worker did not come up: .*no_such_module"):
            run("WRONG")
    with sqlite3.connect(place()) as journal:
        assert journal.execute("SELECT count(*) FROM trial WHERE status = 'started'").fetchone() == (0,)
    journal.close()


def test_compiling_alone_needs_no_device(run: Callable[..., Run]) -> None:
    done = run("COMPILED", compile_only=True, arch="sm_90", clock="no_such_module:Clock")
    assert done.code == 0
    assert [(key["ready"], key["out"]) for key in done.found["keys"]] == [(3, 3)] * 2
    assert not folders.tables().exists()
    nothing = run("UNCOMPILED", compile_only=True, arch="sm_90")
    assert (nothing.code, [(key["ready"], key["out"]) for key in nothing.found["keys"]]) == (1, [(0, 1)])


def test_a_page_says_how_many_keys_are_answered(run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    done = run("PLAIN")
    conclude_measured(console(), done.found)
    assert "every key had a verified answer after" in capsys.readouterr().out
    again = run("PLAIN")
    conclude_measured(console(), again.found)
    assert "3 of 3 keys have a verified answer" in capsys.readouterr().out


def test_tables_are_exported_and_merged(
    run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("PLAIN", export=tmp_path / "a.json")
    run("DEADLY", export=tmp_path / "b.json")
    assert merge(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json") == 0
    assert "4 rows" in capsys.readouterr().out
    merged = table.read(tmp_path / "c.json")["rows"]
    assert [row["family"] for row in merged] == ["deadly", "plain", "plain", "plain"]
    run("PLAIN", export=tmp_path / "b.json")  # into one that is there
    assert len(table.read(tmp_path / "b.json")["rows"]) == 4
    run("PLAIN", export=tmp_path / "new")  # a folder that is not there yet
    (written,) = (tmp_path / "new").iterdir()
    assert written.name == "sm_90-132sm-50mb-227kb.json"
    with pytest.raises(Refused, match="cannot be read"):
        merge(tmp_path / "a.json", tmp_path / "none.json", None)
