"""Finals: the finalists of a key race in rounds, and the winner is verified again before it is written down."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from .family import Values, canonical
from .journal import Journal
from .plan import ATTEMPTS, BROKEN, Candidate, Entry, Fault
from .pool import Outcome
from .race import FINALISTS, ROUNDS, Result, decide, finalists, regret
from .resources import spills

FINAL: Final = 60.0  # seconds that a final may take
EACH: Final = 2.0  # and more for each finalist
CONFIRM: Final = 120.0
LAUNCHES: Final = 9  # of a finalist in a round


class Finals:
    """Holds finals.

    Args:
        journal: Where winners are written.
        ask: Has the measuring worker do something, and waits for it.
        faults: Where those who fail are listed.
        exhaustive: Whether everybody is a finalist.
        brisk: Whether there is little time: half as many finalists and launches.
    """

    def __init__(
        self, journal: Journal, ask: Callable[..., Outcome], faults: list[Fault], *, exhaustive: bool = False,
        brisk: bool = False,
    ) -> None:  # fmt: skip
        self.journal, self.ask, self.faults, self.exhaustive = journal, ask, faults, exhaustive
        self.most, self.launches = (FINALISTS // 2, LAUNCHES // 2) if brisk else (FINALISTS, LAUNCHES)

    def conclude(self, entry: Entry) -> None:
        """Hold the final of a key, and write its winner down once it was verified again.

        Who fails there is out, and the race is held anew without the time that it set.
        """
        rounds: dict[str, list[float]] = {}
        while entry.raced:
            names = self.finalists(entry)
            if not set(names) <= set(rounds):
                rounds = self.final(entry, names)
            rounds = {name: spent for name, spent in rounds.items() if name in names}
            if not rounds:
                break
            result = decide(rounds, entry.heuristic, lambda name: weight(entry.candidates[name]))
            others = [] if result.winner == entry.heuristic else [case.fields for case in entry.relatives]
            choice = dict(entry.candidates[result.winner].choice)
            verdict = self.ask(entry, "confirm", CONFIRM, choice=choice, relatives=others)
            value = verdict.value if verdict.status == "ok" else {}
            if value.get("status") == "verified":
                self.crown(entry, rounds, result, value)
                return
            self.expel(entry, result.winner, value.get("status", verdict.status), value.get("note") or verdict.message)
        entry.given_up = "no choice passed its verification"

    def finalists(self, entry: Entry) -> list[str]:
        """Who is in the final of a key."""
        if self.exhaustive:
            return [one.name for one in entry.raced]
        return finalists({one.name: one.times for one in entry.raced}, entry.heuristic, self.most)

    def final(self, entry: Entry, names: list[str]) -> dict[str, list[float]]:
        """Race finalists; a final that dies is held again, then without whoever dies alone, then one by one."""
        for _ in range(ATTEMPTS):
            if not names:
                break
            outcome = self.race(entry, names)
            if outcome.status == "ok":
                return outcome.value
        survivors: dict[str, list[float]] = {}
        for name in names:
            outcome = self.race(entry, [name])
            if outcome.status == "ok":
                survivors |= outcome.value
            else:
                self.expel(entry, name, "poison", f"in a final, {outcome.message}")
        if 1 < len(survivors) < len(names):
            outcome = self.race(entry, list(survivors))
            if outcome.status == "ok":
                return outcome.value
        return survivors

    def race(self, entry: Entry, names: list[str]) -> Outcome:
        """One final."""
        choices = [dict(entry.candidates[name].choice) for name in names]
        seconds = FINAL + 2.0 * len(names)
        return self.ask(entry, "final", seconds, choices=choices, rounds=ROUNDS, launches=self.launches)

    def expel(self, entry: Entry, name: str, status: str, message: str) -> None:
        """Take a finalist out for good."""
        candidate = entry.candidates[name]
        candidate.state, candidate.note = "out", message
        if entry.won is not None and canonical(entry.won["choice"]) == name:  # it won before
            entry.won, entry.finished = None, False
        status = "poison" if status in BROKEN else status
        self.journal.finish(entry.scope, entry.case.posed, candidate.choice, status, note=message)
        self.faults.append(Fault(entry=entry, candidate=candidate, status=status, message=message))

    def crown(self, entry: Entry, rounds: dict[str, list[float]], result: Result, verdict: dict[str, Any]) -> None:
        """Write a winner down, with what stands behind it."""
        winner = entry.candidates[result.winner]
        heuristic = result.seconds.get(entry.heuristic)
        alive = [one for one in entry.candidates.values() if one.state != "out"]
        listed = sorted(result.seconds, key=lambda name: (name != result.winner, result.seconds[name], name))
        evidence = {
            "us": microseconds(result.seconds[result.winner]),
            "heuristic": ordered(entry.candidates[entry.heuristic].choice),
            "heuristic_us": None if heuristic is None else microseconds(heuristic),
            "noise": round(result.noise, 4), "rounds": len(rounds[result.winner]),
            "finalists": [
                [ordered(entry.candidates[name].choice), microseconds(result.seconds[name])]
                for name in listed[: FINALISTS + 1]
            ],
            "raced": len(entry.raced), "space": len(alive), "resources": winner.resources,
            "problem": dict(entry.case.problem), "verified": max(winner.worst, verdict["worst"]),
        }  # fmt: skip
        if self.exhaustive:
            times = {one.name: one.times for one in entry.raced}
            lost = regret(times, rounds, entry.heuristic, lambda name: weight(entry.candidates[name]))
            evidence["regret"] = round(lost, 4)
        self.journal.win(
            entry.scope, entry.case.posed, winner.choice, worst=verdict["worst"], repeated=verdict["repeated"],
            evidence=evidence,
        )  # fmt: skip
        entry.won = {"choice": dict(winner.choice), "evidence": evidence}
        entry.finished = True


def weight(candidate: Candidate) -> tuple[int, int, int]:
    """What decides between equals: stack, shared memory, registers."""
    used = candidate.resources
    return spills(used), used.get("shared", 0), used.get("registers", 0)


def ordered(choice: Values) -> dict[str, Any]:
    """Write a choice in one order, whatever the family's."""
    return dict(sorted(choice.items()))


def microseconds(seconds: float) -> float:
    """Round to four digits: the others are noise, and noise in a diff."""
    return float(f"{seconds * 1e6:.4g}")


def rows(entries: Sequence[Entry], journal: Journal, triton: str) -> list[dict[str, Any]]:
    """Make rows of a table from the winners in the journal: of a key's problems those of this run, or the newest."""
    scopes = {entry.scope: entry for entry in entries}
    asked = {(entry.scope, canonical(entry.case.posed)) for entry in entries}
    made: dict[tuple[int, str], dict[str, Any]] = {}
    for scope, entry in scopes.items():
        winners = sorted(journal.winners(scope).items(), key=lambda won: (scope, won[0]) in asked)  # the last one stays
        for posed, won in winners:
            key = json.loads(posed)["key"]
            made[scope, canonical(key)] = {
                "family": entry.family.name, "key": key, "choice": won["choice"], **won["evidence"],
                "digest": entry.digest, "triton": triton,
            }  # fmt: skip
    return list(made.values())
