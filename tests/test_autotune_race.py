"""Who stays in a race and who wins it; and a trial, which times what it has verified."""

from pathlib import Path
from typing import Any

import fake_kernels

from longspan.autotune.device import offline
from longspan.autotune.family import canonical
from longspan.autotune.finals import Finals
from longspan.autotune.journal import Journal
from longspan.autotune.measurer import Measurer
from longspan.autotune.plan import plan
from longspan.autotune.pool import Outcome
from longspan.autotune.race import decide, finalists, regret


def test_finalists_that_die_together_and_not_alone_are_judged_by_their_times_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    (entry, *_) = plan(fake_kernels.PLAIN, offline("sm_90"), journal, "3.6.0")
    raced: list[int] = []

    def ask(*_: Any, choices: list[Any], **__: Any) -> Outcome:
        raced.append(len(choices))
        return Outcome(1, "ok", {canonical(choices[0]): [1.0]}) if len(choices) == 1 else Outcome(1, "crash")

    names = list(entry.candidates)
    assert Finals(journal, ask, []).final(entry, names) == {name: [1.0] for name in names}
    assert raced == [4, 4, 1, 1, 1, 1]
    journal.close()


def test_finalists_are_the_fastest_and_the_heuristic() -> None:
    times = {"a": [1.0, 1.1], "b": [1.05, 1.06], "c": [1.3, 1.3], "slow": [9.0, 9.0]}
    assert finalists(times, "slow") == ["a", "b", "slow"]
    assert finalists(times, "a", most=1) == ["a"]
    assert finalists(times, "gone") == ["a", "b"]


def test_ties_go_to_the_lightest_whatever_the_noise_says() -> None:
    weights = {"a": 3, "b": 1, "c": 2}
    order = [
        decide({"a": [x], "b": [y], "c": [1.2]}, "none", weights.__getitem__).winner
        for x, y in ((1, 1.004), (1.004, 1))
    ]
    assert order == ["b", "b"]
    assert decide({"a": [1.0], "b": [1.02]}, "none", weights.__getitem__).winner == "a"
    noisy = {"a": [1.0, 1.04, 0.96], "b": [1.02, 1.02, 1.02]}
    assert decide(noisy, "none", weights.__getitem__).winner == "b"  # within twice the noise of the best


def test_the_heuristic_is_replaced_for_more_than_one_percent_only() -> None:
    rounds = {"heuristic": [1.0], "better": [0.995]}
    assert decide(rounds, "heuristic", len).winner == "heuristic"
    assert decide({**rounds, "better": [0.98]}, "heuristic", len).winner == "better"


def test_regret_is_what_the_race_loses_to_a_sweep() -> None:
    rounds = {"a": [1.0], "b": [1.1], "c": [1.25]}
    assert regret({"a": [2.0] * 6, "b": [1.9] * 6, "c": [9.0] * 6}, rounds, "b", len) == 0
    cut = {"a": [2.9, 2.9, 0.1, 0.1, 0.1, 0.1], "b": [2.0] * 6, "c": [1.95] * 6}  # the best was slow when it was tried
    assert round(regret(cut, rounds, "c", len), 6) == 0.1
    assert regret(cut, rounds, "a", len) == 0  # a heuristic is never cut


def test_a_trial_launches_more_of_what_keeps_up() -> None:
    measurer = Measurer(["fake_kernels:PLAIN"], "fake_kernels:gate", "fake_kernels:Scripted")
    case = {"key": {"size": 16}, "problem": {"size": 16}, "variant": {}}
    choice = {"way": "honest", "cost": 90}
    fast = measurer.trial("plain", case, choice)
    assert (fast["status"], len(fast["times"])) == ("raced", 6)
    assert len(measurer.trial("plain", case, choice, best=50e-6)["times"]) == 2  # cut
    assert measurer.confirm("plain", case, choice) == {"status": "verified", "worst": 0.0, "repeated": True}
