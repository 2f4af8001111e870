"""The modules of benchmarks/ as tests see them: scripts, and in no package."""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Bench = SimpleNamespace
Patch = pytest.MonkeyPatch
Printed = pytest.CaptureFixture[str]
NAMES = ("cells", "ask", "blocks", "peers", "gate", "clock", "record", "page", "plots", "race")


@pytest.fixture
def bench(monkeypatch: Patch) -> SimpleNamespace:
    """The modules of benchmarks/, which are scripts and in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("matplotlib")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return SimpleNamespace(**{name: import_module(name) for name in NAMES})


def small(bench: Bench, section: str = "forward", **changed: Any) -> Any:
    """A cell of a section at a size for a CPU."""
    sizes = {"h": 2, "g": 1, "m": 40, "n": 40, "d": 16, "mask": "causal", "rotary": section == "rotate"} | changed
    return bench.cells.Cell(section=section, **sizes)
