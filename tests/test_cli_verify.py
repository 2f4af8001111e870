"""`longspan verify` and `longspan backends`, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longspan import backends
from longspan.cli.main import run
from longspan.laws import LAWS
from longspan.laws.mutants import MUTANTS


def pasted(out: str) -> str:
    """Cut the program out of what verify printed."""
    return out[out.index("from longspan") :]


@pytest.mark.parametrize("mutant", ["causal_from_the_top_left", "other_pairing", "merge_averages"])
def test_a_planted_bug_is_rejected_by_a_case_that_fails_when_pasted(
    capsys: pytest.CaptureFixture[str], mutant: str
) -> None:
    law = next(found.law for found in MUTANTS if found.name == mutant)
    assert run(["verify", "--mutant", mutant, "--law", law, "--seconds", "300", "--seed", "1", "--device", "cpu"]) == 1
    out, _ = capsys.readouterr()
    assert f"A law is broken: {law}" in out
    program = pasted(out)
    with pytest.raises(AssertionError, match="exceeds budget"):
        exec(program, {})  # noqa: S102 - that it fails is what is promised
    honest = re.sub(r"backend = .*", "from longspan import backends; backend = backends.load('eager')", program)
    exec(honest, {})  # noqa: S102 - and that it fails because of the bug


def test_a_counterexample_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    law = "attention_is_its_definition"
    assert run(["verify", "--mutant", "window_one_short", "--law", law, "--seconds", "300", "--seed", "2"]) == 1
    problem = re.search(r"problem = Attention\((.*)\)", capsys.readouterr().out)
    assert problem is not None
    sizes = dict(re.findall(r"\b([mn])=(\d+)", problem[1]))
    assert int(sizes["m"]) <= 3
    assert int(sizes["n"]) <= 3


def test_the_specification_passes_every_law_and_each_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--backend", "eager", "--seconds", "1", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["holds"]
    assert report["counterexample"] is None
    assert set(report["laws"]) == {law.name for law in LAWS}
    assert all(law["tried"] >= 1 and law["worst_fraction_of_budget"] <= 1 for law in report["laws"].values())


def test_a_seed_repeats_the_same_search(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "--mutant", "lse_in_base_2", "--law", "attention_is_its_definition", "--seconds", "300"]
    outcomes = []
    for seed in ("5", "5"):
        assert run([*arguments, "--seed", seed, "--json"]) == 1
        outcomes.append(json.loads(capsys.readouterr().out))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["laws"]["attention_is_its_definition"]["broken"]


def test_a_search_draws_different_problems_under_different_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    worst = set()
    for seed in range(3):
        law = "rotation_is_its_definition"
        assert run(["verify", "--law", law, "--seconds", "0.5", "--seed", str(seed), "--json"]) == 0
        worst.add(json.loads(capsys.readouterr().out)["laws"][law]["worst_fraction_of_budget"])
    assert len(worst) > 1


def test_the_command_is_plain_in_a_pipe_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longspan.cli.main", "verify", "--seconds", "0.5", "--law", "merging_has_no_order"]
    found = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)  # as this interpreter finds the project
    environment = {**os.environ, "PYTHONPATH": found}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "merging_has_no_order" in done.stdout
    assert "--seed" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_pytorch() -> None:
    code = "import sys; from longspan.cli.main import run; run(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)  # noqa: S603
    assert done.stdout.strip().endswith("False")
    assert all(verb in done.stdout for verb in ("backends", "verify", "preflight"))


def test_every_backend_is_reported_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["backends", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)["backends"]
    assert set(report) == set(backends.NAMES)
    runnable = {name for name, found in report.items() if found["unavailable"] is None}
    assert runnable == set(backends.available())
    assert report["eager"]["declines"] == dict.fromkeys(backends.OPERATIONS)
    assert run(["backends", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in backends.NAMES)
