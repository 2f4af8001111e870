"""The choice of a launch: a dictionary hit; never a search, and after a key's first call never a file either.

In this order: what `override` says, the user's own results, the table shipped for this device, the same again made
under another minor version of Triton, the nearest device of the same architecture, the nearest key, the heuristic.
All but the first three are announced once, at the logger ``longspan``: as a warning where device or compiler differ.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

from . import folders, table
from .device import Device, current, illegal, minor, triton_version
from .digest import digest
from .family import Values, canonical, imported, phrase

LOG: Final = logging.getLogger("longspan")
K = TypeVar("K")
C = TypeVar("C")
FORCED: Final[ContextVar[Mapping[str, Values]]] = ContextVar("longspan_choices", default={})  # noqa: B039 - never written to

UNTUNED: Final[ContextVar[bool]] = ContextVar("longspan_untuned", default=False)


@contextmanager
def override(choices: Mapping[str, Values]) -> Iterator[None]:
    """Launch families with these choices, by name, until the context ends: for tests and experiments."""
    token = FORCED.set({**FORCED.get(), **choices})
    try:
        yield
    finally:
        FORCED.reset(token)


@contextmanager
def untuned() -> Iterator[None]:
    """Launch by the heuristic alone until the context ends, whatever was tuned."""
    token = UNTUNED.set(True)
    try:
        yield
    finally:
        UNTUNED.reset(token)


def overridden() -> bool:
    """Whether choices are not those that serve: who remembers launches must neither use them nor add to them then."""
    return bool(FORCED.get()) or UNTUNED.get()


class Asked(NamedTuple):
    """A key as tables know it."""

    family: str
    arch: str
    key: Values


@dataclass(frozen=True)
class Found:
    """A row, and how it was found."""

    row: dict[str, Any]
    notice: str | None
    level: int


class Lookup(Generic[K, C]):
    """Choices of one kind of key.

    Args:
        asked: From a key to what tables know it by.
        build: From a key and a row's choice to a choice. TypeError and ValueError mean that it is of another time.
        heuristic: From a key to the choice that serves where no row does.
        sources: Import strings of the functions that a family compiles, by its name; rows of other code do not serve.
        nearby: Numbers of a key in which a row may differ, by so much, if no row has the same.
    """

    def __init__(
        self, asked: Callable[[K], Asked], build: Callable[[K, Values], C], heuristic: Callable[[K], C],
        sources: Mapping[str, Sequence[str]], nearby: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.asked, self.build, self.heuristic, self.sources, self.nearby = (
            asked,
            build,
            heuristic,
            sources,
            nearby or {},
        )
        self.known: dict[K, C] = {}
        LOOKUPS.append(self)

    def __call__(self, key: K) -> C:
        """Return the choice for a key."""
        forced = FORCED.get()
        if forced:
            choice = forced.get(self.asked(key).family)
            if choice is not None:
                return self.build(key, choice)
        if UNTUNED.get():
            return self.heuristic(key)
        try:
            return self.known[key]
        except KeyError:
            return self.resolve(key)

    def resolve(self, key: K) -> C:
        """Find the choice for a key that is asked for the first time."""
        with SHELF.lock:
            if key not in self.known:
                asked = self.asked(key)
                self.known[key] = self.served(key, asked) or self.heuristic(key)
            return self.known[key]  # while nobody else can forget it

    def served(self, key: K, asked: Asked) -> C | None:
        """Return the choice that was tuned; whatever is wrong with tables or sources costs a launch only that."""
        try:
            return self.tuned(key, asked)
        except Exception as error:  # noqa: BLE001 - sources that changed on disk, a driver that cannot say what it is
            SHELF.say(
                f"tuned choices of {asked.family} cannot be looked up ({type(error).__name__}: {error}): the heuristic "
                "serves"
            )  # fmt: skip
            return None

    def tuned(self, key: K, asked: Asked) -> C | None:
        """Return the choice of the first row that serves; a row that cannot is announced and passed over."""
        device = SHELF.device()
        if device is None or device.arch != asked.arch or asked.family not in self.sources:
            return None
        for found in SHELF.search(asked, device, self.digest(asked.family), self.nearby):
            try:
                choice = self.build(key, found.row["choice"])
            except (TypeError, ValueError) as error:
                SHELF.say(f"a tuned choice of {asked.family} is of another time and was passed over: {error}")
                continue
            if found.notice is not None:
                SHELF.say(found.notice, found.level)
            return choice
        SHELF.say(
            f"no tuned choice of {asked.family} for {phrase(asked.key)} on {device.slug}: the heuristic serves "
            "(`longspan tune` measures this GPU once)", level=logging.INFO,
        )  # fmt: skip
        return None

    def digest(self, family: str) -> str:
        """Digest of the code that a family compiles, taken once."""
        if family not in SHELF.digests:
            SHELF.digests[family] = digest(map(imported, self.sources[family]))
        return SHELF.digests[family]


class Shelf:
    """The tables that a process has read: once, at the first key that is looked up."""

    def __init__(self) -> None:
        self.unlock()
        self.forget()

    def unlock(self) -> None:
        """Take a lock that nobody holds."""
        self.lock = threading.RLock()

    def forget(self) -> None:
        """Read everything anew when it is asked for next."""
        self.read: list[dict[str, Any]] | None = None
        self.rows: dict[str, list[tuple[dict[str, Any], Device]]] = {}
        self.here: list[Device | None] = []
        self.digests: dict[str, str] = {}
        self.said: set[str] = set()

    def say(self, notice: str, level: int = logging.WARNING) -> None:
        """Announce something, once."""
        if notice not in self.said:
            self.said.add(notice)
            LOG.log(level, notice)

    def device(self) -> Device | None:
        """The GPU of this process: of several of one architecture the one that was current first."""
        if not self.here:
            self.here.append(current())
        return self.here[0]

    def load(self) -> None:
        """Read the user's tables, then those shipped; what is none is announced and passed over."""
        if self.read is not None:
            return
        read: list[dict[str, Any]] = []
        for path in [*self.own(), *listed(folders.SHIPPED)]:
            try:
                read.append(table.read(path))
            except table.BadTable as bad:
                self.say(f"{bad}; it is passed over")
        for found in read:
            owner = table.device_of(found)
            for row in found["rows"]:
                self.rows.setdefault(row["family"], []).append((row, owner))
        self.read = read  # not before: who fails half-way must not leave half a shelf

    def own(self) -> list[Path]:
        """Tables of the user; none where the user has no home."""
        try:
            return listed(folders.tables())
        except folders.Homeless as homeless:
            self.say(str(homeless), level=logging.INFO)
            return []

    def search(self, asked: Asked, device: Device, code: str, nearby: Mapping[str, float]) -> Iterator[Found]:
        """Yield rows that could serve, best first."""
        self.load()
        current_minor, name = minor(triton_version()), canonical(asked.key)
        usable = []
        for at, (row, owner) in enumerate(self.rows.get(asked.family, [])):
            if owner.arch != device.arch:
                continue
            if row["digest"] != code:
                self.say(
                    f"{asked.family} has changed since it was tuned on {owner.slug}: those choices no longer serve"
                )
                continue
            apart = distance(row["key"], asked.key, nearby)
            if apart is None or (owner.slug != device.slug and illegal(row["resources"], device) is not None):
                continue
            other = minor(row["triton"]) != current_minor
            # Sorted by how far the row is from what was asked: another key, another device, another compiler.
            far = (apart, owner.slug != device.slug, abs(owner.multiprocessors - device.multiprocessors), other, at)
            said = notice(row, owner, device, name, current_minor)
            # Another size of this device's own is no reason to worry; another device or compiler may be.
            level = logging.WARNING if other or owner.slug != device.slug else logging.INFO
            usable.append((far, Found(row, said, level)))
        yield from (found for _, found in sorted(usable, key=lambda pair: pair[0]))


def notice(row: dict[str, Any], owner: Device, device: Device, name: str, compiler: str) -> str | None:
    """Say in what a row differs from what was asked, or None."""
    differs = []
    if owner.slug != device.slug:
        differs.append(f"tuned on {owner.slug}, and this is {device.slug}")
    if minor(row["triton"]) != compiler:
        differs.append(f"tuned under triton {row['triton']}, and this is {compiler}")
    if canonical(row["key"]) != name:
        differs.append(f"tuned for {phrase(row['key'])}, the nearest key")
    if not differs:
        return None
    return f"choices of {row['family']} were " + "; ".join(differs) + " (`longspan tune` measures this GPU once)"


def distance(tuned: Values, asked: Values, nearby: Mapping[str, float]) -> float | None:
    """How far apart two keys are in the numbers that may differ; None where others do, or these do by too much."""
    if set(tuned) != set(asked):
        return None
    apart = 0.0
    for name, value in asked.items():
        if tuned[name] != value:
            numbers = isinstance(value, int | float) and isinstance(tuned[name], int | float)
            differs = abs(tuned[name] - value) if numbers and name in nearby else 0  # pyright: ignore[reportOperatorIssue]
            if not 0 < differs <= nearby.get(name, 0.0):
                return None
            apart += differs
    return apart


def listed(folder: Path) -> list[Path]:
    """Tables of a folder, sorted; none where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except OSError:
        return []


SHELF: Final = Shelf()
if hasattr(os, "register_at_fork"):  # a lock that another thread holds is held for ever in a child that lacks it
    os.register_at_fork(after_in_child=SHELF.unlock)
LOOKUPS: Final[list[Lookup[Any, Any]]] = []
FORGETTERS: Final[list[Callable[[], None]]] = []


def on_forget(act: Callable[[], None]) -> None:
    """Have something done by `forget`: whoever remembers what was launched under a choice must forget it, too."""
    FORGETTERS.append(act)


def forget() -> None:
    """Forget what was read and resolved: the next calls see the tables as they are then."""
    with SHELF.lock:
        SHELF.forget()
        for lookup in LOOKUPS:
            lookup.known.clear()
        for act in FORGETTERS:
            act()
