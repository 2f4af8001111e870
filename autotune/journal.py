"""The journal of tuning: every result a transaction, so that kill -9 at any moment loses at most the choice in flight.

SQLite with a write-ahead log. A launch on the device is written down as started before it is made: what a killed run
leaves started is suspect, and tried last. A winner cannot be written without the verification of that very choice for
that very key: a foreign key says so. A key here is any plain data; the tuner's says what is
looked up and what was timed.
"""

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from . import folders
from .family import Values, canonical

MAGIC: Final = 0x4C535449  # "LSTI": names the file's owner in its header
VERSION: Final = 2
BUSY: Final = 20.0  # seconds to wait for another tuner's transaction

SCHEMA: Final = """
CREATE TABLE scope (
  id INTEGER PRIMARY KEY, family TEXT NOT NULL, digest TEXT NOT NULL, device TEXT NOT NULL, triton TEXT NOT NULL,
  UNIQUE (family, digest, device, triton)
);
CREATE TABLE compilation (
  scope INTEGER NOT NULL REFERENCES scope (id), variant TEXT NOT NULL, choice TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('ok', 'illegal', 'error', 'crash', 'timeout')),
  resources TEXT NOT NULL, seconds REAL NOT NULL, note TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (scope, variant, choice)
);
CREATE TABLE trial (
  scope INTEGER NOT NULL REFERENCES scope (id), key TEXT NOT NULL, choice TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('started', 'raced', 'wrong', 'error', 'crash', 'timeout', 'poison')),
  attempts INTEGER NOT NULL, worst REAL, times TEXT NOT NULL, note TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (scope, key, choice), CHECK (status <> 'raced' OR worst <= 1)
);
CREATE TABLE verification (
  id INTEGER PRIMARY KEY, scope INTEGER NOT NULL, key TEXT NOT NULL, choice TEXT NOT NULL,
  worst REAL NOT NULL CHECK (worst <= 1), repeated INTEGER NOT NULL CHECK (repeated = 1), at REAL NOT NULL,
  UNIQUE (scope, key, choice, id), FOREIGN KEY (scope, key, choice) REFERENCES trial (scope, key, choice)
);
CREATE TABLE winner (
  scope INTEGER NOT NULL, key TEXT NOT NULL, choice TEXT NOT NULL, verification INTEGER NOT NULL,
  evidence TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (scope, key),
  FOREIGN KEY (scope, key, choice, verification) REFERENCES verification (scope, key, choice, id)
);
"""


class Unusable(RuntimeError):  # noqa: N818 - a fact about a file
    """A journal that cannot be used, said in one sentence with what to do about it."""


class Journal:
    """An open journal.

    Args:
        path: The file; made, with its folders, where there is none.

    Raises:
        Unusable: For a file that is damaged or not ours, or a place that cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.told():
            path.parent.mkdir(parents=True, exist_ok=True)
            if (kind := folders.remote(path.parent)) is not None:
                msg = (
                    f"the journal cannot live in {path.parent}, which is on {kind}: locks do not hold there; set "
                    f"{folders.VARIABLE} to a folder on a local disk"
                )
                raise Unusable(msg)
            self.store = sqlite3.connect(path, timeout=BUSY, isolation_level=None)
            try:
                self.open()
            except BaseException:
                self.store.close()
                raise

    def open(self) -> None:
        """Check whose file it is, and set it up where it is new."""
        run = self.store.execute
        magic, version = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        empty = run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not empty and magic != MAGIC:
            msg = f"{self.path} is a database of another program; move it away, or set {folders.VARIABLE}"
            raise Unusable(msg)
        if not empty and version != VERSION:
            msg = f"{self.path} must be a journal of version {VERSION}, got {version}; move it away to start anew"
            raise Unusable(msg)
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")  # what was committed survives this process; the last of it no power cut
        run("PRAGMA foreign_keys = ON")
        if empty:
            with self.transaction():
                if run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:  # another tuner may have been faster
                    for statement in SCHEMA.split(";\n"):
                        run(statement)
                    run(f"PRAGMA application_id = {MAGIC}")
                    run(f"PRAGMA user_version = {VERSION}")
        elif (verdict := run("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            msg = f"{self.path} is damaged ({verdict}); move it away to start anew: tables that were made from it stay"
            raise Unusable(msg)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn what SQLite and the file system refuse into sentences."""
        try:
            yield
        except sqlite3.Error as error:
            raise Unusable(self.sentence(error)) from error
        except OSError as error:
            msg = (
                f"the journal cannot be kept at {self.path}: {error.strerror}; set {folders.VARIABLE} to another folder"
            )
            raise Unusable(msg) from error

    def sentence(self, error: sqlite3.Error) -> str:
        """Say what is wrong with the file, and what helps."""
        words = str(error)
        elsewhere = f"set {folders.VARIABLE} to another folder"
        if "disk is full" in words or "disk I/O" in words:
            return f"{self.path} cannot be written ({words}): free some space, or {elsewhere}; what was measured stays"
        if "readonly" in words or "unable to open" in words:
            return f"{self.path} cannot be written ({words}): {elsewhere}"
        if "locked" in words:
            return f"{self.path} is locked: another tuner has held a transaction for {BUSY:g} s"
        if "not a database" in words or "malformed" in words:
            return f"{self.path} is no journal, or a damaged one ({words}): move it away to start anew, or {elsewhere}"
        return f"{self.path} cannot be used: {words}"

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing."""
        self.store.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.store.in_transaction:
                self.store.execute("ROLLBACK")
            raise
        self.store.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def scope(self, family: str, digest: str, device: str, triton: str) -> int:
        """Number of what results hold for: code, device and compiler."""
        values = family, digest, device, triton
        with self.told():
            self.store.execute(
                "INSERT OR IGNORE INTO scope (family, digest, device, triton) VALUES (?, ?, ?, ?)", values
            )
            where = "SELECT id FROM scope WHERE (family, digest, device, triton) = (?, ?, ?, ?)"
            return int(self.store.execute(where, values).fetchone()[0])

    def forget(self, scope: int) -> None:
        """Drop what was measured, and what failed to compile; what was compiled stays, since it is the same again."""
        with self.told(), self.transaction():
            self.store.execute("DELETE FROM compilation WHERE scope = ? AND status NOT IN ('ok', 'illegal')", (scope,))
            for table in ("winner", "verification", "trial"):
                self.store.execute(f"DELETE FROM {table} WHERE scope = ?", (scope,))  # noqa: S608 - names from above

    def compiled(
        self, scope: int, variant: Values, choice: Values, status: str, *, resources: Mapping[str, Any] | None = None,
        seconds: float = 0.0, note: str = "",
    ) -> None:  # fmt: skip
        """Write down a compilation."""
        row = (
            scope, canonical(variant), canonical(choice), status, json.dumps(resources or {}), seconds, note[:2000],
            time.time(),
        )  # fmt: skip
        with self.told():
            self.store.execute("INSERT OR REPLACE INTO compilation VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def start(self, scope: int, key: Mapping[str, Any], choice: Values) -> None:
        """Write down that a choice is about to be launched."""
        row = scope, canonical(key), canonical(choice), time.time()
        with self.told():
            self.store.execute(
                "INSERT INTO trial VALUES (?, ?, ?, 'started', 1, NULL, '[]', '', ?)"
                " ON CONFLICT DO UPDATE SET status = 'started', attempts = attempts + 1, at = excluded.at"
                " WHERE trial.status <> 'raced'",  # what was acknowledged stays, whoever tries it again
                row,
            )

    def withdraw(self, scope: int, key: Mapping[str, Any], choice: Values) -> None:
        """Write down that a choice that was started was not launched after all."""
        row = scope, canonical(key), canonical(choice)
        with self.told(), self.transaction():
            self.store.execute("DELETE FROM trial WHERE (scope, key, choice) = (?, ?, ?) AND attempts = 1", row)
            self.store.execute("UPDATE trial SET attempts = attempts - 1 WHERE (scope, key, choice) = (?, ?, ?)", row)

    def finish(
        self, scope: int, key: Mapping[str, Any], choice: Values, status: str, *, worst: float | None = None,
        times: list[float] | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Write down what came of a choice that was started."""
        with self.told():
            self.store.execute(
                "UPDATE trial SET status = ?, worst = ?, times = ?, note = ?, at = ?"
                " WHERE (scope, key, choice) = (?, ?, ?)",
                (
                    status,
                    worst,
                    json.dumps(times or []),
                    note[:4000],
                    time.time(),
                    scope,
                    canonical(key),
                    canonical(choice),
                ),
            )

    def win(
        self,
        scope: int,
        key: Mapping[str, Any],
        choice: Values,
        *,
        worst: float,
        repeated: bool,
        evidence: Mapping[str, Any],
    ) -> None:
        """Write down a winner with the verification that it stands on, or neither."""
        at, name, chosen = time.time(), canonical(key), canonical(choice)
        with self.told(), self.transaction():
            verified = self.store.execute(
                "INSERT INTO verification (scope, key, choice, worst, repeated, at) VALUES (?, ?, ?, ?, ?, ?)",
                (scope, name, chosen, worst, int(repeated), at),
            ).lastrowid
            self.store.execute(
                "INSERT OR REPLACE INTO winner VALUES (?, ?, ?, ?, ?, ?)",
                (scope, name, chosen, verified, json.dumps(evidence), at),
            )

    def compilations(self, scope: int) -> dict[tuple[str, str], dict[str, Any]]:
        """All compilations, by variant and choice."""
        with self.told():
            rows = self.store.execute(
                "SELECT variant, choice, status, resources, note FROM compilation WHERE scope = ?", (scope,)
            ).fetchall()
        return {
            (variant, choice): {"status": status, "resources": json.loads(resources), "note": note}
            for variant, choice, status, resources, note in rows
        }

    def trials(self, scope: int) -> dict[tuple[str, str], dict[str, Any]]:
        """All trials, by key and choice."""
        with self.told():
            rows = self.store.execute(
                "SELECT key, choice, status, attempts, worst, times, note FROM trial WHERE scope = ?", (scope,)
            ).fetchall()
        return {
            (key, choice): {
                "status": status,
                "attempts": attempts,
                "worst": worst,
                "times": json.loads(times),
                "note": note,
            }
            for key, choice, status, attempts, worst, times, note in rows
        }

    def winners(self, scope: int) -> dict[str, dict[str, Any]]:
        """All winners, by key, the newest last; none that was found wrong since."""
        with self.told():
            rows = self.store.execute(
                "SELECT winner.key, winner.choice, evidence, verification.worst, repeated FROM winner"
                " JOIN verification ON verification.id = winner.verification"
                " JOIN trial USING (scope, key, choice) WHERE winner.scope = ? AND trial.status = 'raced'"
                " ORDER BY winner.at",
                (scope,),
            ).fetchall()
        return {
            key: {
                "choice": json.loads(choice),
                "evidence": json.loads(evidence),
                "worst": worst,
                "repeated": bool(repeated),
            }
            for key, choice, evidence, worst, repeated in rows
        }


def place() -> Path:
    """Where the user's journal is."""
    return folders.results() / f"journal-v{VERSION}.sqlite3"
