"""The coordinator: it compiles ahead, tries choices key by key in turn, holds finals and writes winners down.

It touches no GPU itself. At any moment the journal holds all that was learnt; after the first round of trials every key
has a verified answer, and what remains of the budget goes into the choices that are left.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .device import Device, illegal
from .family import Values
from .journal import Journal
from .plan import ATTEMPTS, Candidate, Entry
from .pool import Outcome, Pool, wait
from .race import CUT, FINALISTS, ROUNDS, decide, finalists
from .race import LAUNCHES as LAUNCHED
from .resources import spills

COMPILE: Final = 90.0  # seconds that one compilation may take
TRIAL: Final = 60.0  # and one trial: verification, compilation of what was not compiled ahead, a few launches
FINAL: Final = 60.0
CONFIRM: Final = 120.0
RESERVE: Final = 4.0  # seconds kept for the final of a key
SPILLED: Final = 10_000  # added to the rank of a choice that spills, so that it comes after all that do not
SUSPECT: Final = 100_000
LAUNCHES: Final = 9  # of a finalist in a round
BROKEN: Final = {"crash", "timeout"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A choice that is out for what it did, and not for what it takes."""

    entry: Entry
    candidate: Candidate
    status: str
    message: str


@dataclass(kw_only=True)
class Tuner:
    """One run.

    Attributes:
        entries: The keys.
        journal: Where every result goes at once.
        device: What is tuned.
        compilers: Compile workers.
        measurers: The one measuring worker; None compiles only.
        exhaustive: Race every choice in the final, too.
        watch: Called whenever something changed.
        faults: Choices that were wrong, crashed or hung.
        answered: Seconds after which every key had a verified answer; None if not yet.
    """

    entries: Sequence[Entry]
    journal: Journal
    device: Device
    compilers: Pool
    measurers: Pool | None
    exhaustive: bool = False
    watch: Callable[["Tuner"], None] = lambda _: None
    faults: list[Fault] = field(default_factory=list)
    stage: str = "trials"
    answered: float | None = None
    begun: float = field(default_factory=time.monotonic)
    compiled: int = 0

    @property
    def open(self) -> list[Entry]:
        """Keys that are not done yet."""
        return [entry for entry in self.entries if not entry.finished]

    def run(self, budget: float) -> None:
        """Tune within so many seconds; finals that are begun are ended."""
        self.begun = time.monotonic()
        reserve = min(0.5 * budget, RESERVE * len(self.open)) if self.measurers is not None else 0.0
        self.trials(self.begun + budget - reserve)
        if self.measurers is None:
            return
        self.stage = "finals"
        self.compilers.close()  # nobody else on the machine while finalists are timed
        for entry in self.open:
            if time.monotonic() > self.begun + budget:
                break
            if entry.raced:
                self.conclude(entry)
                self.watch(self)

    def trials(self, deadline: float) -> None:
        """Compile and try until nothing is left, or the time is up."""
        pools = [self.compilers] if self.measurers is None else [self.compilers, self.measurers]
        while time.monotonic() < deadline:
            self.feed_compilers()
            self.feed_measurer()
            if not any(pool.pending for pool in pools):
                return
            for outcome in wait(pools, min(0.5, max(0.0, deadline - time.monotonic()))):
                kind, entry, candidate = outcome.tag
                (self.compiled_one if kind == "compile" else self.tried_one)(entry, candidate, outcome)
            self.watch(self)
        while self.measurers is not None and self.measurers.pending:  # what is in flight is heard out
            for outcome in wait([self.measurers], 1.0):
                _, entry, candidate = outcome.tag
                self.tried_one(entry, candidate, outcome)

    # Compiling.

    def feed_compilers(self) -> None:
        """Queue compilations: of all keys their first choice, then of all their second, and so on."""
        while len(self.compilers.waiting) < self.compilers.count:
            new = ((entry.next("new"), entry) for entry in self.open)
            found = min(
                ((one, entry) for one, entry in new if one is not None), key=lambda pair: pair[0].rank, default=None
            )
            if found is None:
                return
            candidate, entry = found
            for twin in self.twins(entry, candidate):
                twin.state = "compiling"
            self.compilers.submit(
                ("compile", entry, candidate), "compile", COMPILE,
                family=entry.family.name, case=entry.fields, choice=dict(candidate.choice),
            )  # fmt: skip

    def twins(self, entry: Entry, candidate: Candidate) -> list[Candidate]:
        """The same choice of all keys that share its compilation."""
        alike = (
            other.candidates.get(candidate.name) for other in self.entries
            if other.scope == entry.scope and other.case.variant == entry.case.variant
        )  # fmt: skip
        return [one for one in alike if one is not None and one.state in {"new", "compiling"}]

    def compiled_one(self, entry: Entry, candidate: Candidate, outcome: Outcome) -> None:
        """Take note of a compilation."""
        self.compiled += 1
        found = outcome.value["resources"] if outcome.status == "ok" else {}
        reason = illegal(found, self.device) if outcome.status == "ok" else f"{outcome.kind} {outcome.message}".strip()
        status = "ok" if reason is None else "illegal" if outcome.status == "ok" else outcome.status
        self.journal.compiled(
            entry.scope, entry.case.variant, candidate.choice, status, resources=found, seconds=outcome.seconds,
            note=reason or "",
        )  # fmt: skip
        if status in BROKEN:
            self.faults.append(
                Fault(entry=entry, candidate=candidate, status=status, message=f"while compiling, {reason}")
            )
        for twin in self.twins(entry, candidate):
            twin.state, twin.resources, twin.note = ("ready" if status == "ok" else "out"), found, reason or ""
            if spills(found) and twin.rank:  # the heuristic stays first
                twin.rank += SPILLED + spills(found)

    # Trying.

    def feed_measurer(self) -> None:
        """Try the next choice: a key's first before any key's second."""
        if self.measurers is None or not self.measurers.idle:
            return
        for state in ("ready", "suspect"):
            found = [(one.rank, at, one, entry) for at, entry in enumerate(self.open) if (one := entry.next(state))]
            first = [place for place in found if not place[3].raced] or found
            if first and (state == "ready" or not self.compilers.pending):
                _, _, candidate, entry = min(first, key=lambda place: place[:2])
                candidate.state = "compiling"  # in flight
                self.journal.start(entry.scope, entry.case.key, candidate.choice)
                candidate.attempts += 1
                self.measurers.submit(
                    ("trial", entry, candidate), "trial", TRIAL, family=entry.family.name, case=entry.fields,
                    choice=dict(candidate.choice), best=None if self.exhaustive else entry.best,
                )  # fmt: skip
                return

    def tried_one(self, entry: Entry, candidate: Candidate, outcome: Outcome) -> None:
        """Take note of a trial."""
        value = outcome.value if outcome.status == "ok" else {}
        status = value.get("status", outcome.status)
        note = value.get("note") or f"{outcome.kind} {outcome.message}".strip()
        if status in BROKEN and candidate.attempts >= ATTEMPTS:
            status = "poison"
        self.journal.finish(
            entry.scope, entry.case.key, candidate.choice, status, worst=value.get("worst"), times=value.get("times"),
            note=note,
        )  # fmt: skip
        if status == "raced":
            candidate.state, candidate.times, candidate.worst = "raced", value["times"], value["worst"]
            if self.answered is None and all(one.raced or one.finished for one in self.entries):
                self.answered = time.monotonic() - self.begun
            return
        candidate.note = note
        candidate.state = "suspect" if status in BROKEN else "out"
        candidate.rank += SUSPECT
        self.faults.append(Fault(entry=entry, candidate=candidate, status=status, message=note))

    # Finals.

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
            verdict = self.ask(entry, "confirm", CONFIRM, choice=dict(entry.candidates[result.winner].choice))
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
        return finalists({one.name: one.times for one in entry.raced}, entry.heuristic)

    def final(self, entry: Entry, names: list[str]) -> dict[str, list[float]]:
        """Race finalists; a final that dies is held again, and then without whoever dies alone."""
        for _ in range(ATTEMPTS):
            if not names:
                break
            outcome = self.race(entry, names)
            if outcome.status == "ok":
                return outcome.value
        survivors = []
        for name in names:
            outcome = self.race(entry, [name])
            if outcome.status == "ok":
                survivors.append(name)
            else:
                self.expel(entry, name, "poison", f"in a final, {outcome.message}")
        outcome = self.race(entry, survivors) if survivors and survivors != names else None
        return outcome.value if outcome is not None and outcome.status == "ok" else {}

    def race(self, entry: Entry, names: list[str]) -> Outcome:
        """One final."""
        choices = [dict(entry.candidates[name].choice) for name in names]
        seconds = FINAL + 2.0 * len(names)
        return self.ask(entry, "final", seconds, choices=choices, rounds=ROUNDS, launches=LAUNCHES)

    def ask(self, entry: Entry, method: str, seconds: float, **arguments: Any) -> Outcome:
        """Have the measuring worker do one thing, and wait for it."""
        assert self.measurers is not None  # noqa: S101 - nobody asks a run that only compiles
        self.measurers.submit(
            (method, entry, None), method, seconds, family=entry.family.name, case=entry.fields, **arguments
        )
        while True:
            outcomes = self.measurers.wait(1.0)
            self.watch(self)
            if outcomes:
                return outcomes[0]

    def expel(self, entry: Entry, name: str, status: str, message: str) -> None:
        """Take a finalist out for good."""
        candidate = entry.candidates[name]
        candidate.state, candidate.note = "out", message
        status = "poison" if status in BROKEN else status
        self.journal.finish(entry.scope, entry.case.key, candidate.choice, status, note=message)
        self.faults.append(Fault(entry=entry, candidate=candidate, status=status, message=message))

    def crown(self, entry: Entry, rounds: dict[str, list[float]], result: Any, verdict: dict[str, Any]) -> None:
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
            evidence["regret"] = round(regret(entry, rounds), 4)
        self.journal.win(
            entry.scope, entry.case.key, winner.choice, worst=verdict["worst"], repeated=verdict["repeated"],
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


def regret(entry: Entry, rounds: dict[str, list[float]]) -> float:
    """By how much the choice that the race alone would have crowned is slower than the fastest of all.

    Args:
        entry: A key all of whose choices were in the final.
        rounds: Their times there.
    """
    times = {one.name: one.times[:LAUNCHED] for one in entry.raced if one.name in rounds}
    best = min(min(spent) for spent in times.values())
    stayed = {name: entry.candidates[name].times for name, spent in times.items() if min(spent) <= CUT * best}
    final = finalists(stayed, entry.heuristic)
    result = decide(
        {name: rounds[name] for name in final if name in rounds},
        entry.heuristic,
        lambda name: weight(entry.candidates[name]),
    )
    return statistics.median(rounds[result.winner]) / min(map(statistics.median, rounds.values())) - 1


def rows(entries: Sequence[Entry], journal: Journal, triton: str) -> list[dict[str, Any]]:
    """Make rows of a table from the winners in the journal."""
    scopes = {entry.scope: entry for entry in entries}
    return [
        {
            "family": entry.family.name, "key": json.loads(key), "choice": won["choice"], **won["evidence"],
            "digest": entry.digest, "triton": triton,
        }
        for scope, entry in scopes.items() for key, won in journal.winners(scope).items()
    ]  # fmt: skip
