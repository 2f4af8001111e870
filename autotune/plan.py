"""What there is to tune on a device: keys, their choices in the order in which they are tried, and what is known.

The order alone decides how good a table is that a short budget leaves: the heuristic first, then what won elsewhere,
then by the family's guess. What spilled registers when it was compiled comes last, and after it what a killed run left.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from .device import Device
from .digest import digest
from .family import Case, Family, Values, canonical, imported
from .journal import Journal
from .lookup import SHELF
from .resources import spills

State = Literal["new", "compiling", "ready", "out", "raced", "suspect"]
ATTEMPTS: Final = 2  # that a choice may take down its worker
SPILLED: Final = 10_000  # added to the rank of a choice that spills
BROKEN: Final = {"crash", "timeout"}  # outcomes that cost a worker its life
# What fails for the machine's sake, and not for the choice's: a full disk, another's memory.
TRANSIENT: Final = ("OSError", "PermissionError", "FileNotFoundError", "MemoryError", "TimeoutExpired")
AGAIN: Final = "again, "  # begins the note of a compilation that failed once before


@dataclass
class Candidate:
    """One choice of one key.

    Attributes:
        state: ``out`` is never launched again: illegal, wrong, poison, or not to be compiled.
        note: Why it is out.
        attempts: How often it was launched and not heard of again.
        recompiled: Whether its compilation failed in an earlier run, for what may have been the machine's sake.
    """

    choice: Values
    name: str
    rank: int
    state: State = "new"
    resources: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    worst: float = 0.0
    attempts: int = 0
    recompiled: bool = False
    note: str = ""

    def learn(self, status: str, resources: dict[str, Any], note: str) -> None:
        """Take note of a compilation; what spills comes after all that does not, but for the heuristic."""
        self.state, self.resources, self.note = "ready" if status == "ok" else "out", resources, note
        if spills(resources) and self.rank:
            self.rank += SPILLED + spills(resources)


@dataclass
class Entry:
    """One key of one family."""

    family: Family
    case: Case
    scope: int
    digest: str
    heuristic: str
    candidates: dict[str, Candidate]
    relatives: Sequence[Case] = ()
    won: dict[str, Any] | None = None
    finished: bool = False
    given_up: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The case, as workers take it."""
        return self.case.fields

    @property
    def raced(self) -> list[Candidate]:
        """Choices with a time."""
        return [one for one in self.candidates.values() if one.state == "raced"]

    @property
    def best(self) -> float | None:
        """Seconds of the fastest so far."""
        return min((min(one.times) for one in self.raced), default=None)

    def next(self, state: State) -> Candidate | None:
        """The best-placed choice in a state."""
        found = (one for one in self.candidates.values() if one.state == state)
        return min(found, key=lambda one: one.rank, default=None)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A choice that is out for what it did, and not for what it takes."""

    entry: Entry
    candidate: Candidate
    status: str
    message: str


def plan(
    families: Iterable[Family], device: Device, journal: Journal, triton: str, *, fresh: bool = False,
    cases: Mapping[str, Sequence[Case]] | None = None,
) -> list[Entry]:  # fmt: skip
    """List what is to tune, with what the journal knows of it.

    Args:
        families: What is tuned.
        device: On which device.
        journal: What was measured before.
        triton: Version of the compiler.
        fresh: Whether to forget what was measured.
        cases: Cases by family, in place of a family's own.
    """
    entries = []
    for family in families:
        wanted = family.cases(device.arch) if cases is None else cases.get(family.name, ())
        if not wanted:
            continue  # its code may be for other machines alone, and not even be there
        code = digest(map(imported, family.sources))
        scope = journal.scope(family.name, code, device.slug, triton)
        if fresh:
            journal.forget(scope)
        known = journal.compilations(scope), journal.trials(scope), journal.winners(scope)
        entries += [entry(family, case, device, scope, code, known) for case in wanted]
    return entries


Known = tuple[Mapping[tuple[str, str], Any], Mapping[tuple[str, str], Any], Mapping[str, Any]]


def entry(family: Family, case: Case, device: Device, scope: int, code: str, known: Known) -> Entry:
    """Put the choices of a key in order, and recall what is known of each."""
    compilations, trials, winners = known
    heuristic, posed = family.heuristic(case, device.arch), canonical(case.posed)
    space = {canonical(choice): choice for choice in family.space(case, device.arch)}
    seeds = [canonical(choice) for choice in elsewhere(family.name, case) if canonical(choice) in space]
    guessed = sorted(space, key=lambda name: (family.cost(case, space[name], device.arch), name))
    space[canonical(heuristic)] = heuristic
    order = dict.fromkeys([canonical(heuristic), *seeds, *guessed])
    candidates = {}
    for rank, name in enumerate(order):
        one = Candidate(space[name], name, rank)
        compiled = compilations.get((canonical(case.variant), name))
        if compiled is not None and passing(compiled):
            one.recompiled = True  # it is compiled once more, and no more
        elif compiled is not None:
            one.learn(compiled["status"], compiled["resources"], compiled["note"])
        tried = trials.get((posed, name))
        if tried is not None:
            recall(one, tried)
        candidates[name] = one
    related = family.relatives(case, device.arch)
    made = Entry(family, case, scope, code, canonical(heuristic), candidates, related, winners.get(posed))
    # A key is done when somebody won and nobody is left who was not tried.
    made.finished = made.won is not None and all(one.state in {"raced", "out"} for one in candidates.values())
    return made


def passing(failed: Mapping[str, Any]) -> bool:
    """Whether a compilation or a trial failed for what may have passed since."""
    transient = failed["status"] in BROKEN or (failed["status"] == "error" and failed["note"].startswith(TRANSIENT))
    return transient and not failed["note"].startswith(AGAIN)


def recall(one: Candidate, tried: Mapping[str, Any]) -> None:
    """Take a trial from the journal."""
    one.attempts, one.note = tried["attempts"], tried["note"] or one.note
    if tried["status"] == "raced":
        one.state, one.times, one.worst = "raced", tried["times"], tried["worst"]
    elif one.attempts >= ATTEMPTS or (tried["status"] in {"wrong", "poison", "error"} and not passing(tried)):
        one.state = "out"
    else:  # it was started, and its worker or the tuner was killed, or the machine had no room for it
        one.state = "suspect"


def elsewhere(family: str, case: Case) -> list[Values]:
    """What won for this key, or one that differs in numbers alone, on any device and of any version of the code."""
    SHELF.load()
    numbers = {
        name for name, value in case.key.items() if not isinstance(value, bool) and isinstance(value, int | float)
    }
    found: list[tuple[float, Values]] = []
    for row, _ in SHELF.rows.get(family, []):
        if set(row["key"]) == set(case.key):
            unlike = [name for name in case.key if row["key"][name] != case.key[name]]
            if all(name in numbers for name in unlike):
                found += [(len(unlike) + place / 10, choice) for place, (choice, _) in enumerate(row["finalists"][:3])]
    return [choice for _, choice in sorted(found, key=lambda pair: (pair[0], canonical(pair[1])))]
