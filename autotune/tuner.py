"""The coordinator: it compiles ahead, tries choices key by key in turn, holds finals and writes winners down.

It touches no GPU itself. At any moment the journal holds all that was learnt; after the first round of trials every key
has a verified answer, and what remains of the budget goes into the choices that are left.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .device import Device, illegal
from .finals import Finals
from .journal import Journal
from .plan import AGAIN, ATTEMPTS, BROKEN, Candidate, Entry, Fault
from .pool import Outcome, Pool, Stillborn, wait

COMPILE: Final = 90.0  # seconds that one compilation may take
TRIAL: Final = 60.0  # and one trial: verification, compilation of what was not compiled ahead, a few launches
RESERVE: Final = 2.0  # seconds kept for the final of a key
BRISK: Final = 150.0  # seconds of a budget below which finals are half as long
REHEARSAL: Final = 20.0  # seconds, at most, for what is compiled before the finals
SUSPECT: Final = 100_000


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
        """Tune until so many seconds after the beginning; finals that are begun are ended."""
        brisk = budget < BRISK
        each = RESERVE / 2 if brisk else RESERVE
        reserve = min(0.5 * budget, each * len(self.open)) if self.measurers is not None else 0.0
        self.trials(self.begun + budget - reserve)
        if self.measurers is None:
            return
        self.rehearse(min(REHEARSAL, 0.5 * reserve))
        self.stage = "finals"
        finals = Finals(self.journal, self.ask, self.faults, exhaustive=self.exhaustive, brisk=brisk)
        self.compilers.close()  # nobody else on the machine while finalists are timed
        for entry in in_turn(self.open):
            if time.monotonic() > self.begun + budget:
                break
            if entry.raced:
                finals.conclude(entry)
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

    def rehearse(self, seconds: float) -> None:
        """Compile what a likely winner will be verified on beyond its own problem: alone, the measurer takes longer.

        What fails here fails again in the verification, which is the one to say so.
        """
        deadline = time.monotonic() + seconds
        self.compilers.waiting.clear()  # nobody will try them
        for entry in self.open:
            leader = min(entry.raced, key=lambda one: statistics.median(one.times), default=None)
            if leader is None or leader.name == entry.heuristic:
                continue
            for case in entry.relatives:
                self.compilers.submit(
                    ("rehearse", entry, leader), "compile", seconds, family=entry.family.name, case=case.fields,
                    choice=dict(leader.choice), target=list(self.device.target),
                    multiprocessors=self.device.multiprocessors,
                )  # fmt: skip
        while self.compilers.pending and time.monotonic() < deadline:
            for outcome in self.compilers.wait(0.5):
                kind, entry, candidate = outcome.tag
                if kind == "compile":  # it was under way
                    self.compiled_one(entry, candidate, outcome)
            self.watch(self)

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
                target=list(self.device.target), multiprocessors=self.device.multiprocessors,
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
        self.came_up(outcome)
        self.compiled += 1
        found = outcome.value["resources"] if outcome.status == "ok" else {}
        reason = illegal(found, self.device) if outcome.status == "ok" else f"{outcome.kind} {outcome.message}".strip()
        status = "ok" if reason is None else "illegal" if outcome.status == "ok" else outcome.status
        self.journal.compiled(
            entry.scope, entry.case.variant, candidate.choice, status, resources=found, seconds=outcome.seconds,
            note=(AGAIN if candidate.recompiled else "") + (reason or ""),
        )  # fmt: skip
        if status in BROKEN:
            self.faults.append(
                Fault(entry=entry, candidate=candidate, status=status, message=f"while compiling, {reason}")
            )
        for twin in self.twins(entry, candidate):
            twin.learn(status, found, reason or "")

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
                self.journal.start(entry.scope, entry.case.posed, candidate.choice)
                candidate.attempts += 1
                self.measurers.submit(
                    ("trial", entry, candidate), "trial", TRIAL, family=entry.family.name, case=entry.fields,
                    choice=dict(candidate.choice), best=None if self.exhaustive else entry.best,
                )  # fmt: skip
                return

    def tried_one(self, entry: Entry, candidate: Candidate, outcome: Outcome) -> None:
        """Take note of a trial."""
        if not outcome.begun:
            self.journal.withdraw(entry.scope, entry.case.posed, candidate.choice)
        self.came_up(outcome)
        value = outcome.value if outcome.status == "ok" else {}
        status = value.get("status", outcome.status)
        self.distrust(status)
        note = value.get("note") or f"{outcome.kind} {outcome.message}".strip()
        if status in BROKEN and candidate.attempts >= ATTEMPTS:
            status = "poison"
        self.journal.finish(
            entry.scope, entry.case.posed, candidate.choice, status, worst=value.get("worst"), times=value.get("times"),
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
                self.came_up(outcomes[0])
                value = outcomes[0].value
                self.distrust(value.get("status", "") if isinstance(value, dict) else "")
                return outcomes[0]

    @staticmethod
    def came_up(outcome: Outcome) -> None:
        """Stop where a worker never came up: that says nothing of any choice, and the next would not either."""
        if not outcome.begun:
            msg = (
                f"a worker did not come up: {outcome.message}. What was measured is in the journal, and "
                "`longspan tune` again goes on from there"
            )
            raise Stillborn(msg)

    def distrust(self, status: str) -> None:
        """Replace the worker of a wrong choice: who writes wrong numbers may have written them anywhere."""
        if status == "wrong" and self.measurers is not None:
            self.measurers.renew()


def in_turn(entries: Sequence[Entry]) -> list[Entry]:
    """Order keys so that every family has its first before any has its second: time may run out."""
    counts: dict[str, int] = {}
    placed = []
    for at, entry in enumerate(entries):
        counts[entry.family.name] = counts.get(entry.family.name, 0) + 1
        placed.append((counts[entry.family.name], at, entry))
    return [entry for _, _, entry in sorted(placed, key=lambda place: place[:2])]
