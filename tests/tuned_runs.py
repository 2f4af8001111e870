"""Runs of `longspan tune` on the kernels of `fake_kernels`, for tests."""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from longspan.autotune import folders, forget
from longspan.cli.tune import Asked, tune

FAKES: dict[str, Any] = {
    "gate": "fake_kernels:gate", "clock": "fake_kernels:Scripted", "compiler": "fake_kernels:Compiler",
    "as_json": True, "budget": 60.0, "workers": 2,
}  # fmt: skip


@dataclass
class Run:
    """What a run said: its exit code, its report, and the report's keys and faults by choice."""

    code: int
    found: dict[str, Any]

    @property
    def won(self) -> list[Any]:
        """The winning cost of every key."""
        return [None if key["choice"] is None else key["choice"]["cost"] for key in self.found["keys"]]

    @property
    def faults(self) -> list[tuple[str, str]]:
        """Way or compilation, and status, of every fault."""
        faults = self.found["faults"]
        return [(one["choice"].get("compile", one["choice"]["way"]), one["status"]) for one in faults]


def running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Run]]:
    """Run the command on fakes; results go to a folder of the test's own."""
    monkeypatch.setenv(folders.VARIABLE, str(tmp_path / "results"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the card of the fakes is everybody's
    monkeypatch.setattr(folders, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr("longspan.cli.tune.triton_version", lambda: "3.6.0")
    forget()

    def once(name: str, **settings: Any) -> Run:
        code = tune(Asked(**{**FAKES, "sources": (f"fake_kernels:{name}",), **settings}))
        return Run(code, json.loads(capsys.readouterr().out))

    yield once
    forget()
