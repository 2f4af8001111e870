"""Every kernel of `flash` compiles for machines that are not here, fits their shared memory, and is on record."""

import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from longspan.laws import offline
from longspan.laws.kernels import kernels

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compiled.md"
from_sources = pytest.mark.skipif(not PAGE.exists(), reason="needs the sources")


def compiled(target: str) -> list[dict[str, Any]]:
    """What a child, which interprets nothing, found out about every case of a target."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-m", "longspan.laws.offline", target],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_kernel_compiles_without_a_gpu_and_fits(target: str) -> None:
    found = compiled(target)
    for one in found:
        assert "ended" not in one, f"{one['kernel']} of {one['case']}: its compile ended with {one['ended']}"
        assert one["shared"] <= offline.TARGETS[target].shared, f"{one['kernel']} of {one['case']}: {one}"
    assert {one["kernel"] for one in found} == set(kernels()), "a kernel that no case of laws/kernel_cases.py launches"


def test_a_compile_that_aborts_or_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "LONGEST", 0.2)
    running, done = [], []
    for kernel, act in (("aborts", abort), ("hangs", lambda: time.sleep(30))):
        results = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by reap
        process = os.fork()
        if process == 0:
            act()
            os._exit(0)
        running.append(offline.Compile(kernel, "case", process, results, time.monotonic()))
    while running:
        offline.reap(running, done)
    assert sorted((one["kernel"], one["ended"]) for one in done) == [("aborts", -6), ("hangs", -9)]


def abort() -> None:
    """Abort as LLVM does; pytest would print a trace of it."""
    faulthandler.disable()
    os.abort()


@from_sources
def test_every_kernel_is_on_record_for_every_target() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text("utf-8").splitlines()]
    head = next(row for row in rows if row and row[0] == "kernel")
    assert head[2:] == list(offline.TARGETS)
    recorded = {
        (row[0].strip("`"), target)
        for row in rows
        if len(row) == len(head)
        for target, cell in zip(head[2:], row[2:], strict=True)
        if re.fullmatch(r"\d+ · \d+ · [\d.]+", cell)
    }
    assert recorded == {(kernel, target) for kernel in kernels() for target in offline.TARGETS}, "run `make compiled`"


@from_sources
def test_readme_says_where_the_kernels_were_run_and_where_they_only_compile() -> None:
    row = next(line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| `flash` |"))
    ran, rest = re.search(r"run on ([^;|]*); only compiled for ([^;|]*)", row).groups()  # pyright: ignore[reportOptionalMemberAccess]
    names = [re.findall(r"sm_\d+|gfx\d+", part) for part in (ran, rest)]
    assert names[0] == ["sm_90"]
    assert sorted(names[0] + names[1]) == sorted(offline.TARGETS)
