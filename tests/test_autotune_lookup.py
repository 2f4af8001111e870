"""A launch finds its choice: in what order tables serve, and what is said of it."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from longspan.autotune import Asked, Lookup, folders, forget, lookup, override, table
from longspan.autotune.device import Device
from longspan.autotune.digest import digest

HERE = Device(arch="sm_90", multiprocessors=132, l2=50 << 20, shared=227 << 10, name="A card")
SMALLER = replace(HERE, multiprocessors=114)
OLDER = replace(HERE, arch="sm_80", shared=163 << 10)


@dataclass(frozen=True)
class Key:
    """What a choice of the tests depends on."""

    width: int
    length: int = 10
    arch: str = "sm_90"


def launched() -> int:
    """Stand for the code that is compiled."""
    return 1


CODE = digest([launched])


def build(key: Key, values: Any) -> int:  # noqa: ARG001 - the signature of a lookup's
    """Make a choice."""
    if not isinstance(values["tile"], int):
        msg = "a tile is a number"
        raise TypeError(msg)
    return values["tile"]


def make(**changed: Any) -> Lookup[Key, int]:
    """Make a lookup whose heuristic is 1."""
    settings: dict[str, Any] = {
        "asked": lambda key: Asked("made.up", key.arch, {"width": key.width, "length": key.length}), "build": build,
        "heuristic": lambda key: 1, "sources": {"made.up": (f"{__name__}:launched",)}, "nearby": {"length": 5.0},  # noqa: ARG005
    }  # fmt: skip
    return Lookup(**{**settings, **changed})


def row(
    tile: Any, *, width: int = 64, length: int = 10, triton: str = "3.6.0", code: str = CODE, shared: int = 1
) -> dict[str, Any]:
    """Make a row of a table."""
    return {
        "family": "made.up", "key": {"width": width, "length": length}, "choice": {"tile": tile}, "us": 1.0,
        "heuristic": {}, "heuristic_us": 1.0, "noise": 0.0,
        "finalists": [[{"tile": tile}, 1.0]], "raced": 1,
        "space": 1, "resources": {"shared": shared, "num_warps": 4}, "problem": {}, "digest": code,
        "triton": triton,
        "verified": 0.1, "rounds": 4,
    }  # fmt: skip


@dataclass
class Shelves:
    """Folders of tables that a test fills."""

    user: Path
    shipped: Path

    def put(self, where: str, device: Device, *rows: dict[str, Any], name: str = "table") -> Path:
        """Write a table."""
        path = getattr(self, where) / f"{name}.json"
        table.write(path, table.make(device, rows))
        forget()
        return path


@pytest.fixture
def shelves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelves]:
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "user"))
    monkeypatch.setattr(folders, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(lookup, "current", lambda: HERE)
    monkeypatch.setattr(lookup, "triton_version", lambda: "3.6.1")
    forget()
    yield Shelves(tmp_path / "user" / "tables", tmp_path / "shipped")
    forget()


def test_without_tables_the_heuristic_serves_and_says_so_once(
    shelves: Shelves, caplog: pytest.LogCaptureFixture
) -> None:
    del shelves
    find = make()
    with caplog.at_level(logging.INFO, "longspan"):
        assert [find(Key(64)) for _ in range(3)] == [1, 1, 1]
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "for width 64, length 10 on sm_90-132sm-50mb-227kb: the heuristic serves" in record.getMessage()


def test_a_users_results_stand_above_what_is_shipped(shelves: Shelves, caplog: pytest.LogCaptureFixture) -> None:
    shelves.put("shipped", HERE, row(2), row(3, width=128))
    find = make()
    assert find(Key(64)) == 2
    shelves.put("user", HERE, row(4))
    assert (find(Key(64)), find(Key(128))) == (4, 3)
    assert caplog.records == []


def test_an_override_stands_above_everything_and_ends_with_its_context(shelves: Shelves) -> None:
    shelves.put("user", HERE, row(4))
    find = make()
    with override({"made.up": {"tile": 9}, "another": {}}):
        assert find(Key(64)) == 9
        with override({"made.up": {"tile": 8}}):
            assert find(Key(64)) == 8
        assert find(Key(64)) == 9
    assert find(Key(64)) == 4


@pytest.mark.parametrize(
    ("device", "changed", "said", "level"),
    [
        (HERE, {"triton": "3.5.0"}, "tuned under triton 3.5.0, and this is 3.6", "WARNING"),
        (SMALLER, {}, "tuned on sm_90-114sm-50mb-227kb, and this is sm_90-132sm-50mb-227kb", "WARNING"),
        (HERE, {"length": 12}, "tuned for width 64, length 12, the nearest key", "INFO"),
    ],
)
def test_what_is_not_exact_serves_and_says_so_once(
    shelves: Shelves, caplog: pytest.LogCaptureFixture, device: Device, changed: dict[str, Any], said: str, level: str
) -> None:
    shelves.put("shipped", device, row(5, **changed))
    find = make()
    with caplog.at_level(logging.INFO, "longspan"):
        assert [find(Key(64)), find(Key(64))] == [5, 5]
    (record,) = caplog.records
    assert record.levelname == level
    assert record.name == "longspan"
    assert said in record.getMessage()


def test_the_nearest_of_several_serves(shelves: Shelves) -> None:
    shelves.put("shipped", replace(HERE, multiprocessors=20), row(2), name="far")
    shelves.put("shipped", SMALLER, row(3), name="near")
    shelves.put("shipped", HERE, row(4, length=30), row(5, length=12), name="own")
    find = make()
    assert find(Key(64)) == 3  # of this key, on the device that is most alike
    assert find(Key(64, length=14)) == 5  # of the nearest key
    assert find(Key(64, length=18)) == 1  # none is near enough
    assert find(Key(32)) == 1  # another width is another kernel


@pytest.mark.parametrize(
    ("device", "changed"),
    [
        (OLDER, {}),  # another architecture
        (HERE, {"code": "0" * 16}),  # another kernel
        (SMALLER, {"shared": 1 << 20}),  # more than this device has
        (HERE, {"tile": "wide"}),  # another time
    ],
)
def test_what_cannot_serve_does_not(shelves: Shelves, device: Device, changed: dict[str, Any]) -> None:
    shelves.put("shipped", device, row(**{"tile": 5, **changed}))
    assert make()(Key(64)) == 1


def test_a_key_of_another_machine_is_answered_by_the_heuristic(shelves: Shelves) -> None:
    shelves.put("shipped", HERE, row(5))
    assert make()(Key(64, arch="interpreter")) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 99, "device": {}, "rows": []}', '{"device": {}, "rows": [{}], "format": 1}', "\xff"],
)
def test_a_file_that_is_no_table_is_named_and_passed_over(
    shelves: Shelves, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    shelves.put("shipped", HERE, row(5))
    shelves.user.mkdir(parents=True)
    (shelves.user / "bad.json").write_text(text, "latin-1")
    assert make()(Key(64)) == 5
    (record,) = caplog.records
    assert "bad.json" in record.getMessage()
    assert "passed over" in record.getMessage()


@pytest.mark.parametrize(
    ("where", "changed", "said"),
    [
        ("rows", {"key": 5}, "row 1 of .* has a key of another kind: '5'"),
        ("rows", {"triton": None}, "a triton of another kind"),
        ("rows", {"resources": None}, "a resources of another kind"),
        ("rows", {"family": [1]}, "a family of another kind"),
        ("rows", {"finalists": [[1, 2]]}, "a finalists of another kind"),
        ("rows", {"choice": {"tile": [1]}}, "a choice of another kind"),
        ("rows", {"raced": 1.5}, "a raced of another kind"),
        ("device", {"multiprocessors": "x"}, "the device of .* has a multiprocessors of another kind"),
        ("device", {"l2": None}, "a l2 of another kind"),
        ("device", {"shared": True}, "a shared of another kind"),
        ("device", {"slug": "another"}, "must have the slug sm_90-132sm-50mb-227kb, got 'another'"),
    ],
)
def test_a_table_with_a_field_of_another_kind_is_refused_whole(
    shelves: Shelves, caplog: pytest.LogCaptureFixture, where: str, changed: dict[str, Any], said: str
) -> None:
    shelves.put("shipped", HERE, row(5))
    path = shelves.put("user", HERE, row(6))
    found = json.loads(path.read_text())
    (found["rows"][0] if where == "rows" else found["device"]).update(changed)
    path.write_text(json.dumps(found))
    with pytest.raises(table.BadTable, match=said):
        table.read(path)
    assert make()(Key(64)) == 5
    assert len(caplog.records) == 1


def test_whatever_fails_while_a_choice_is_looked_up_costs_that_choice_alone(
    shelves: Shelves, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(_: object) -> str:
        msg = "could not get source code"
        raise OSError(msg)

    shelves.put("user", HERE, row(6))
    monkeypatch.setattr(lookup, "digest", changed)
    find = make()
    assert [find(Key(64)), find(Key(128))] == [1, 1]
    (record,) = caplog.records
    assert "OSError: could not get source code" in record.getMessage()


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's home away, as `env -i` or a container's unknown user does."""

    def none(*_: object, **__: object) -> Path:
        msg = "could not determine the home directory"
        raise RuntimeError(msg)

    monkeypatch.delenv(folders.VARIABLE, raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", none)


def test_a_user_without_a_home_is_served_what_is_shipped(shelves: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    shelves.put("shipped", HERE, row(5), row(6, width=128))
    homeless(monkeypatch)
    find = make()
    assert [find(Key(64)), find(Key(128))] == [5, 6]
    with pytest.raises(folders.Homeless, match=folders.VARIABLE):
        folders.results()


def test_calls_after_the_first_look_at_no_file(shelves: Shelves, monkeypatch: pytest.MonkeyPatch) -> None:
    shelves.put("shipped", HERE, row(5))
    find = make()
    assert find(Key(64)) == 5
    monkeypatch.setattr(lookup.Shelf, "search", None)
    monkeypatch.setattr(lookup.Lookup, "resolve", None)
    assert find(Key(64)) == 5


FORKED = """
import os, signal, threading
from longspan.autotune.lookup import SHELF

held, done = threading.Event(), threading.Event()

def hold():
    with SHELF.lock:
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
if (child := os.fork()) == 0:
    os._exit(0 if SHELF.lock.acquire(timeout=0) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
thread.join()
os._exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_a_choice_is_looked_up_can_look_up_others() -> None:
    found = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", FORKED], check=True, timeout=60, env={**os.environ, "PYTHONPATH": found}
    )
