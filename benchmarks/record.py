"""The results file of a device: JSON that reads well in a diff, one entry a table, each from one run."""

import json
import platform
import re
import subprocess
import tomllib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from cells import SECTIONS, Cell
from clock import Reading
from gate import Verdict

RESULTS: Final = Path(__file__).parent / "results"
PACKAGES: Final = ("torch", "triton", "flash-attn-4", "liger-kernel")
PROJECT: Final = Path(__file__).parent.parent / "pyproject.toml"  # what runs here, whatever is installed


def path_of(device: str, folder: Path) -> Path:
    """File of a device's results."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def versions() -> dict[str, str]:
    """What a figure depends on beside the card."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda or torch.version.hip)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    found["longspan"] = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["version"]
    cudnn = torch.backends.cudnn.version()
    return found | {"cudnn": str(cudnn), "driver": driver()}


def driver() -> str:
    """Version of the device's driver, where the vendor's tool tells it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)  # noqa: S603
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def now() -> str:
    """Date and minute, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


def entry(cell: Cell, readings: dict[str, Reading], verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """One cell's results: figures of those that raced, reasons of those that did not."""
    raced = [
        {
            "kernel": name,
            "figure": significant(cell.figure(reading.seconds)),
            "unit": cell.unit,
            "median_us": significant(reading.seconds * 1e6),
            "spread": significant(reading.spread, 2),
            "rounds": reading.rounds,
            "timed": reading.timed,
            "eager_us": None if reading.eager is None else significant(reading.eager * 1e6),
            "error_by_budget": significant(verdicts[name].worst or 0.0, 2),
        }
        for name, reading in sorted(readings.items())
    ]
    return {"name": cell.name, "cell": cell.as_json(), "readings": raced, **absent(verdicts)}


def memory_entry(cell: Cell, peaks: dict[str, int], verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """One length's results: bytes at the peak beyond inputs and results."""
    raced = [{"kernel": name, "extra_bytes": extra} for name, extra in sorted(peaks.items())]
    return {"name": cell.name, "cell": cell.as_json(), "readings": raced, **absent(verdicts)}


def absent(verdicts: dict[str, Verdict]) -> dict[str, dict[str, str]]:
    """Who did not race, and why."""
    return {
        outcome: {name: x.reason for name, x in sorted(verdicts.items()) if x.outcome == outcome}
        for outcome in ("failed", "skipped")
    }


def significant(x: float, digits: int = 4) -> float:
    """Round to significant digits: the others are noise, and noise in a diff."""
    return float(f"{x:.{digits}g}")


def load(path: Path) -> dict[str, Any]:
    """Read a results file."""
    return json.loads(path.read_text("utf-8"))


def save(path: Path, device: str, section: str, run: dict[str, Any]) -> None:
    """Put one table's results into a file; tables that this run did not race stay as they were."""
    found = load(path) if path.exists() else {"device": device, "sections": {}}
    sections = {**found["sections"], section: run}
    found["sections"] = {name: sections[name] for name in SECTIONS if name in sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
