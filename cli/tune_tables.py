"""The tables of `longspan tune`: the user's own, the one that was asked for, and two merged into one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.autotune import folders, forget, table
from longspan.autotune.device import Device, minor
from longspan.autotune.digest import digest
from longspan.autotune.family import canonical, families, imported
from longspan.autotune.finals import rows
from longspan.autotune.journal import Journal
from longspan.autotune.plan import Entry
from longspan.autotune.table import BadTable

from .page import Refused, console


def keep(export: Path | None, device: Device, entries: Sequence[Entry], journal: Journal, triton: str) -> None:
    """Write the user's table, and the one that was asked for."""
    wrong = refuted(entries, journal)
    made = [row for row in rows(entries, journal, triton) if place(row) not in wrong]
    out = wrong | thrown_out(entries)
    paths = [folders.tables() / f"{device.slug}-triton-{minor(triton)}.json"]
    if export is not None:
        paths.append(file(export, device.slug))
    for path in paths:
        with told(path):
            old = known(path, device)
            kept = remaining(old, made, out)
            if made or len(kept) < len(old):
                table.write(path, table.make(device, [*kept, *made]))
        forget()


def file(export: Path, slug: str) -> Path:
    """Return the file that was meant: what does not end in .json is a folder, there or not."""
    return export if export.suffix == ".json" and not export.is_dir() else export / f"{slug}.json"


def place(row: dict[str, Any]) -> tuple[str, ...]:
    """Family, key, code and choice of a row."""
    return *table.order(row), row["digest"], canonical(row["choice"])


def refuted(entries: Sequence[Entry], journal: Journal) -> set[tuple[str, ...]]:
    """Places of all that was ever found wrong, on whichever problem of its key."""
    return {
        (entry.family.name, canonical(json.loads(posed)["key"]), entry.digest, choice)
        for scope, entry in {entry.scope: entry for entry in entries}.items()
        for (posed, choice), tried in journal.trials(scope).items() if tried["status"] == "wrong"
    }  # fmt: skip


def thrown_out(entries: Sequence[Entry]) -> set[tuple[str, ...]]:
    """Places of all that is out by now, whenever it won."""
    return {
        (entry.family.name, entry.case.name, entry.digest, name)
        for entry in entries for name, one in entry.candidates.items() if one.state == "out"
    }  # fmt: skip


def known(path: Path, device: Device) -> list[dict[str, Any]]:
    """Return the rows of a table that is there; none of one that is damaged, which is made from the journal."""
    try:
        old = table.read(path) if path.exists() else table.make(device, [])
    except BadTable:
        return []
    return old["rows"] if old["device"]["slug"] == device.slug else []


def remaining(old: list[dict[str, Any]], made: list[dict[str, Any]], out: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Return the rows that stay beside new ones: those of other keys whose choices are not out."""
    names = {table.order(row) for row in made}
    return [row for row in old if table.order(row) not in names and place(row) not in out]


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror}; what was measured is in the journal"
        raise Refused(msg) from None


def merge(first: Path, second: Path, out: Path | None, sources: Sequence[str] = ()) -> int:
    """Merge two tables into one, printed or written; rows of the code of these families stand above others."""
    try:
        merged = table.merge(table.read(first), table.read(second), codes(sources))
    except BadTable as bad:
        raise Refused(str(bad)) from None
    path = second if out is None else file(out, merged["device"]["slug"])
    with told(path):
        table.write(path, merged)
    console().print(f"{len(merged['rows'])} rows in {path}")
    return 0


def codes(sources: Sequence[str]) -> Mapping[str, str]:
    """Return the digest of what each family compiles; none where its kernels cannot be imported."""
    try:
        return {name: digest(map(imported, family.sources)) for name, family in families(sources).items()}
    except ValueError:
        return {}
