"""Tables of tuned choices: JSON with one line a row, sorted, so that a difference of two tables reads well.

A row says for one key of one family which choice won, what it and the heuristic took, who else was in the final, what
the compiled kernel takes of the device, and what the choice was verified by.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from .device import Device
from .family import canonical

FORMAT: Final = 1


def text(value: Any) -> bool:
    """Whether this is a text."""
    return isinstance(value, str)


def number(value: Any) -> bool:
    """Whether this is a number that counts or measures something."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def count(value: Any) -> bool:
    """Whether this is a whole number of something."""
    return isinstance(value, int) and number(value)


def values(value: Any) -> bool:
    """Whether this is a key, a choice or a problem: names of plain data."""
    return isinstance(value, dict) and all(isinstance(one, bool | int | float | str) for one in value.values())


def numbers(value: Any) -> bool:
    """Whether this is names of numbers."""
    return isinstance(value, dict) and all(map(number, value.values()))


def raced(value: Any) -> bool:
    """Whether this is choices and their times."""
    return isinstance(value, list) and all(
        isinstance(one, list) and len(one) == 2 and values(one[0]) and number(one[1]) for one in value
    )


ROW: Final = {
    "family": text, "key": values, "choice": values, "us": number, "heuristic": values,
    "heuristic_us": lambda value: value is None or number(value), "noise": number, "finalists": raced, "raced": count,
    "space": count, "resources": numbers, "problem": values, "digest": text, "triton": text, "verified": number,
    "rounds": count,
}  # fmt: skip
DEVICE: Final = {
    "slug": text, "arch": text, "multiprocessors": count, "l2": count, "shared": count, "name": text,
}  # fmt: skip


class BadTable(ValueError):  # noqa: N818 - a fact about a file
    """A file that is no table, said in one sentence."""


def order(row: dict[str, Any]) -> tuple[str, str]:
    """Rows are sorted, and unique, by this."""
    return row["family"], canonical(row["key"])


def make(device: Device, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Make a table of one device."""
    about = {
        "slug": device.slug, "arch": device.arch, "multiprocessors": device.multiprocessors, "l2": device.l2,
        "shared": device.shared, "name": device.name,
    }  # fmt: skip
    return {"format": FORMAT, "device": about, "rows": sorted(rows, key=order)}


def device_of(table: dict[str, Any]) -> Device:
    """Return the device that a table is of."""
    about = table["device"]
    return Device(**{name: about[name] for name in ("arch", "multiprocessors", "l2", "shared", "name")})


def write(path: Path, table: dict[str, Any]) -> None:
    """Write a table, whole or not at all."""
    head = {name: value for name, value in table.items() if name != "rows"}
    lines = [json.dumps(row, ensure_ascii=False) for row in table["rows"]]
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Read a table.

    Raises:
        BadTable: For a file that cannot be read, or is no table of this format.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise BadTable(msg) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits, a deep nest
        msg = f"{path} is no table of tuned choices: it is not JSON ({error})"
        raise BadTable(msg) from error
    if not isinstance(table, dict) or not isinstance(table.get("rows"), list) or "device" not in table:
        msg = f"{path} is no table of tuned choices: it must hold a device and rows"
        raise BadTable(msg)
    if table.get("format") != FORMAT:
        msg = f"{path} must be a table of format {FORMAT}, got {table.get('format')!r}"
        raise BadTable(msg)
    check(table["device"], DEVICE, f"the device of {path}")
    if (slug := device_of(table).slug) != table["device"]["slug"]:
        msg = f"the device of {path} must have the slug {slug}, got {table['device']['slug']!r}"
        raise BadTable(msg)
    for at, row in enumerate(table["rows"], 1):
        check(row, ROW, f"row {at} of {path}")
    return table


def check(found: Any, fields: Mapping[str, Callable[[Any], bool]], what: str) -> None:
    """See that all fields are there and of their kinds: what is served later must not fail then."""
    if not isinstance(found, dict) or not set(fields) <= set(found):
        missing = set(fields) - set(found) if isinstance(found, dict) else set(fields)
        msg = f"{what} must have {', '.join(sorted(missing))}"
        raise BadTable(msg)
    for name, right in fields.items():
        if not right(found[name]):
            msg = f"{what} has a {name} of another kind: {str(found[name])[:80]!r}"
            raise BadTable(msg)


def merge(first: dict[str, Any], second: dict[str, Any], codes: Mapping[str, str]) -> dict[str, Any]:
    """Merge two tables of one device: of two rows of a key the one with more behind it, or else the second.

    A row of today's code stands above one of other code, which would not serve, and one of a newer Triton above one of
    an older; then the one that raced more of its space, in more rounds.

    Args:
        first: A table.
        second: Another of the same device.
        codes: Digests of today's code, by family.

    Raises:
        BadTable: For tables of two devices.
    """
    slugs = first["device"]["slug"], second["device"]["slug"]
    if slugs[0] != slugs[1]:
        msg = f"tables to merge must be of one device, got {slugs[0]} and {slugs[1]}"
        raise BadTable(msg)
    rows = {order(row): row for row in first["rows"]}
    for row in second["rows"]:
        known = rows.get(order(row))
        if known is None or evidence(row, codes) >= evidence(known, codes):
            rows[order(row)] = row
    return {**second, "rows": sorted(rows.values(), key=order)}


def evidence(row: dict[str, Any], codes: Mapping[str, str]) -> tuple[bool, tuple[int, ...], int, int]:
    """How much there is behind a row."""
    version = tuple(int(part) for part in row["triton"].split(".")[:2] if part.isdecimal())
    return row["digest"] == codes.get(row["family"]), version, row["raced"], row["rounds"]
