"""What a race leaves: a results file that is whole, and the pages and pictures made from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarked import BENCHMARKS, Bench, Patch, Printed, bench, small

__all__ = ["bench"]  # a fixture
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the sources")


def raced(bench: Bench, monkeypatch: Patch, tmp_path: Path) -> tuple[int, Any]:
    """Run the command with a pretended GPU, a gate that fails one and skips another, and a clock that reads 1 ms."""
    cell = small(bench, quick=True)
    outcomes = {
        "flash": "failed", "FlexAttention": "skipped", "flash-attn-4": "skipped", "SDPA cuDNN": "passed",
        "SDPA FA2": "passed", "sdpa": "passed", "Liger": "skipped", "hopper": "skipped",
    }  # fmt: skip
    verdicts = {name: bench.gate.Verdict(name, outcome, f"{name} said so", 0.5) for name, outcome in outcomes.items()}
    gpu = {"is_available": True, "get_device_name": "Pretended 9000", "synchronize": None, "empty_cache": None}
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(bench.race, "cells", lambda: [cell])
    monkeypatch.setattr(bench.race, "gated", lambda _: {cell.features: verdicts})
    monkeypatch.setattr(bench.race, "of_cell", lambda cell, seed, _: bench.ask.of_cell(cell, seed, "cpu"))
    timed = lambda ready, *_, count: {name: bench.clock.summary([1e-3] * count, "events") for name in ready}  # noqa: E731
    monkeypatch.setattr(bench.race, "race", timed)
    code = bench.race.main(["--quick", "--out", str(tmp_path)])
    return code, json.loads((tmp_path / "pretended-9000.json").read_text("utf-8"))


def test_who_fails_gets_no_figure_and_the_run_says_so(
    bench: Bench, monkeypatch: Patch, tmp_path: Path, capsys: Printed
) -> None:
    code, results = raced(bench, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert (code, "FAILED, and got no figure: flash: flash said so" in printed) == (1, True)
    (cell,) = results["sections"]["forward"]["cells"]
    assert [x["kernel"] for x in cell["readings"]] == ["SDPA FA2", "sdpa"]
    assert all(x["figure"] == pytest.approx(4 * 800 * 16 * 2 / 1e-3 / 1e12) for x in cell["readings"])
    assert cell["failed"] == {"flash": "flash said so"}
    # A CPU has no cuDNN: it passed the gate, and is out with the reason at full size. Liger is of another table.
    assert cell["skipped"].pop("SDPA cuDNN").startswith("RuntimeError")
    assert cell["skipped"] == {name: f"{name} said so" for name in ("FlexAttention", "flash-attn-4", "hopper")}
    assert all(name in printed for name in ("FlexAttention said so", "SDPA FA2"))


def test_tables_that_a_run_did_not_race_stay(bench: Bench, monkeypatch: Patch, tmp_path: Path) -> None:
    bench.record.save(tmp_path / "pretended-9000.json", "Pretended 9000", "rotate", {"date": "then", "cells": []})
    _, results = raced(bench, monkeypatch, tmp_path)
    assert list(results["sections"]) == ["forward", "rotate"]
    assert results["sections"]["rotate"] == {"date": "then", "cells": []}


def test_without_a_gpu_the_race_says_what_it_needs(bench: Bench, monkeypatch: Patch, capsys: Printed) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.race.main([]) == 2
    assert capsys.readouterr().out.startswith("race.py needs a GPU")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_results_are_whole(bench: Bench, path: Path) -> None:
    results = bench.record.load(path)
    assert path.name == bench.record.path_of(results["device"], path.parent).name
    assert path.read_text("utf-8") == json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    known = {cell.name: cell for cell in bench.cells.cells()}
    for section, run in results["sections"].items():
        assert {"torch", "triton", "driver", "cuda", "flash-attn-4", "liger-kernel"} <= set(run["versions"])
        assert run["date"].endswith("Z")
        for found in run["cells"]:
            cell = known[found["name"]]
            assert (cell.section, cell.as_json(), found["failed"]) == (section, found["cell"], {})
            assert {x["kernel"] for x in found["readings"]}.isdisjoint(found["skipped"])
            for x in found["readings"]:
                assert section == "memory" or x["figure"] == pytest.approx(cell.figure(x["median_us"] * 1e-6), rel=1e-3)


def test_the_pages_are_what_the_script_makes_of_the_results(bench: Bench) -> None:
    for page, made in bench.plots.made(bench.plots.recorded()).items():
        text = page.read_text("utf-8")
        assert text == bench.page.replaced(text, made)


def test_a_rating_is_the_geometric_mean_over_the_problems_that_both_ran(bench: Bench) -> None:
    times = [
        {"flash": 2.0, "flash, pages of 64": 3.0, "SDPA FA2": 4.0, "FlexAttention": 1.0},
        {"flash": 2.0, "SDPA FA2": 1.0}, {"flash": 5.0}, {"SDPA FA2": 9.0, "sdpa": 1.0, "read sweep": 1.0},
    ]  # fmt: skip
    cells = [{"readings": [{"kernel": name, "median_us": time} for name, time in cell.items()]} for cell in times]
    rated = {
        "SDPA FA2": "1.00 (0.50 … 2.00)", "FlexAttention": "0.50 (0.50 … 0.50)",
        bench.page.FASTEST: "0.50 (0.50 … 0.50)",
    }  # fmt: skip
    assert bench.page.ratios(cells) == {"flash": rated}
    run = {"date": "2026-01-01T00:00Z", "cells": cells}
    _, shown = bench.page.against({"device": "GPU", "sections": {"rotate": run, "forward": run}}, set())
    assert shown.splitlines()[2:] == [
        f"| {title} | flash | {' | '.join(rated.values())} |" for title in ("rotary embedding", "attention, forward")
    ]


def test_pictures_and_tables_show_every_figure(bench: Bench, monkeypatch: Patch, tmp_path: Path) -> None:
    _, results = raced(bench, monkeypatch, tmp_path)
    run = results["sections"]["forward"]
    monkeypatch.setattr(bench.plots, "IMAGES", tmp_path)
    assert (
        (path := bench.plots.draw(results["device"], "forward", run["cells"], tmp_path))
        .read_bytes()
        .startswith(b"\x89PNG")
    )
    brief = bench.plots.made([results])[bench.plots.README]
    assert f"](docs/images/{path.name})" in brief
    text = bench.plots.made([results])[bench.plots.PAGE]
    assert f"images/{path.name}" in text
    assert "| problem | sdpa | SDPA FA2 |" in text
    assert "- flash failed in 1 of 1: flash said so" in text
    figures = {x["kernel"]: {40: x["figure"]} for x in run["cells"][0]["readings"]}
    assert bench.plots.panels("forward", run["cells"]) == {"d16, 2/1 heads, causal": figures}
    two = bench.plots.sketch("GPU", "forward", {"low": {"a": {1024: 1.0}}, "high": {"a": {1024: 9.0}}}, ["a"])
    assert [ax.get_ylim()[1] > 9 for ax in two.axes] == [True, True]  # nothing is drawn outside of its panel
