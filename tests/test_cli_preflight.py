"""`longspan preflight`: numbers against hand calculations, on every shipped configuration."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan import backends
from longspan.cli import machine, memory
from longspan.cli.main import run
from longspan.laws.mutants import MUTANTS

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
NAMES = {
    "llama-3.1-8b": {"all": 32},
    "qwen2.5-7b-instruct-yarn": {"all": 28},
    "gpt-oss-20b": {"sliding_attention": 12, "full_attention": 12},
    "phi-3-mini-128k-instruct": {"all": 32},
}


def preflight(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """Run preflight and read its JSON."""
    assert run(["preflight", *map(str, arguments), "--device", "cpu", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def small(folder: Path, **changed: Any) -> Path:
    """Write a small config."""
    config = {
        "model_type": "mistral", "torch_dtype": "float32", "hidden_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 10000.0,
        "sliding_window": None,
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config | changed), "utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configurations_are_served_within_the_budget(capsys: pytest.CaptureFixture[str], name: str) -> None:
    report = preflight(capsys, CONFIGS / f"{name}.json", "--context", 64)
    assert {kind: layer["count"] for kind, layer in report["layers"].items()} == NAMES[name]
    assert report["ok"]
    assert "INSIDE THE BUDGET at 64 tokens" in report["verdict"]
    for layer in report["layers"].values():
        checked = layer["accuracy"]
        assert checked["inside"]
        assert checked["of_prefill"]
        assert 0 < checked["worst_fraction_of_budget"] <= 1
        assert {0, 32, 63} <= set(checked["rows"])
        assert layer["backend"]["serves"]["attention"] in backends.NAMES
        assert layer["prefill"]["measured_at"] == layer["decode"]["measured_at"] == 64
        assert not layer["prefill"]["extrapolated"]
        planes = [band["planes"] for band in layer["rotation"]["bands"].values()]
        assert sum(planes) == layer["rotation"]["planes"] == layer["rotary_dim"] // 2


def test_bands_of_llama_are_those_of_its_paper_values(capsys: pytest.CaptureFixture[str]) -> None:
    layer = preflight(capsys, CONFIGS / "llama-3.1-8b.json", "--context", 64)["layers"]["all"]
    rotation = layer["rotation"]
    assert layer["trained_context"] == 8192
    assert rotation["type"] == "llama3"
    assert rotation["bands"]["high"]["effect"] == "unchanged"
    assert rotation["bands"]["low"]["effect"] == "interpolated ÷ 8"
    assert rotation["attention_factor"] == 1
    waves = [2 * math.pi * 500000 ** (2 * plane / 128) for plane in range(64)]
    assert rotation["wavelengths"]["trained"] == pytest.approx(waves, rel=1e-12)
    assert rotation["bands"]["low"]["planes"] == sum(wave > 8192 for wave in waves)
    assert rotation["bands"]["high"]["planes"] == sum(wave < 8192 / 32 for wave in waves)


def test_the_attention_factor_and_the_target_of_gpt_oss(capsys: pytest.CaptureFixture[str]) -> None:
    report = preflight(capsys, CONFIGS / "gpt-oss-20b.json", "--context", 64)
    full = report["layers"]["full_attention"]
    assert full["rotation"]["attention_factor"] == pytest.approx(0.1 * math.log(32) + 1, rel=1e-12)
    assert (full["trained_context"], report["target_context"]) == (4096, 131072)
    assert full["sinks"]
    assert report["layers"]["sliding_attention"]["window"] == 128


def test_cache_is_what_a_hand_calculation_gives(capsys: pytest.CaptureFixture[str]) -> None:
    report = preflight(capsys, CONFIGS / "gpt-oss-20b.json", "--context", 300)
    token = 2 * 8 * 64 * 2  # keys and values, 8 heads of 64, two bytes each
    assert report["model"]["cache_bytes"] == 24 * token * 300
    assert report["model"]["cache_bytes_windowed"] == 12 * token * 300 + 12 * token * 128


def test_a_model_is_its_layers_times_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = preflight(capsys, small(tmp_path), "--context", 1024)
    layer = report["layers"]["all"]
    for phase in ("prefill", "decode"):
        assert report["model"][f"{phase}_seconds"] == pytest.approx(3 * layer[phase]["seconds"])
        assert [point["length"] for point in layer[phase]["points"]] == [256, 512, 1024]
    inputs = 1024 * (4 + 2 + 2) * 16 * 4
    assert layer["prefill"]["peak_bytes"] >= inputs
    assert report["model"]["cache_bytes"] == 3 * 1024 * 2 * 2 * 16 * 4


def test_what_was_not_measured_is_extrapolated_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = preflight(capsys, small(tmp_path), "--context", 2**17, "--seconds", 0.5)
    long = report["layers"]["all"]["prefill"]
    last = long["points"][-1]
    assert long["extrapolated"]
    assert long["growth"] == "n^2"
    assert last["length"] < 2**17
    assert long["seconds"] == pytest.approx(last["seconds"] * (2**17 / last["length"]) ** 2)
    assert "prefill" in report["model"]["extrapolated"]
    assert any("extrapolated from there by n^2" in note for note in report["notes"])
    assert not report["layers"]["all"]["accuracy"]["of_prefill"]


def test_windows_grow_with_the_length_and_not_with_its_square(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = preflight(capsys, small(tmp_path, sliding_window=16), "--context", 300)
    (layer,) = report["layers"].values()
    assert (layer["window"], layer["prefill"]["growth"]) == (16, "n^1")
    assert layer["cache_bytes_windowed"] * 300 == layer["cache_bytes"] * 16


def test_planes_that_reach_new_angles_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = preflight(capsys, small(tmp_path), "--context", 64)["layers"]["all"]["rotation"]
    assert inside["unseen_planes"] == 0
    report = preflight(capsys, small(tmp_path), "--context", 256)
    outside = report["layers"]["all"]["rotation"]
    assert outside["unseen_planes"] == outside["bands"]["low"]["planes"] > 0
    assert outside["unseen_reach"] == pytest.approx(4)
    assert report["verdict"].startswith("BEYOND ITS CONTEXT")
    scaled = small(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0})
    mended = preflight(capsys, scaled, "--context", 256)["layers"]["all"]["rotation"]
    assert mended["unseen_planes"] == 0
    assert {band["effect"] for band in mended["bands"].values()} <= {"interpolated ÷ 4", "no planes"}


@pytest.mark.parametrize(
    "mutant", ["causal_from_the_top_left", "attention_factor_missing", "window_one_short", "q_offset_ignored"]
)
def test_a_wrong_backend_is_outside_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    wrong = next(found.backend for found in MUTANTS if found.name == mutant)
    if mutant == "attention_factor_missing":
        monkeypatch.setattr(
            wrong, "rotate_qk", lambda q, k, *rest, **options: tuple(wrong.rotate(x, *rest, **options) for x in (q, k))
        )
    if mutant == "q_offset_ignored":
        monkeypatch.setattr("longspan.cli.preflight.prefill", no_prefill)
    monkeypatch.setattr("longspan.cli.preflight.load_backend", lambda _name: wrong)
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    window = 5 if mutant == "window_one_short" else None
    path = small(tmp_path, rope_scaling=scaling, sliding_window=window)
    report = preflight(capsys, path, "--context", 100, "--backend", "eager", code=1)
    assert report["verdict"].startswith("OUTSIDE THE BUDGET")
    assert not report["ok"]


def no_prefill(_backend: Any, _plan: Any, context: int, _seconds: float) -> Any:
    """Stand for a context too long for a prefill."""
    from longspan.cli.measure import Curve  # noqa: PLC0415

    return Curve(context, 2, stopped="this test says so"), None


def test_a_kind_of_layer_that_nobody_serves_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small(
        tmp_path, model_type="gemma2", head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=50.0,
        sliding_window=32,
    )  # fmt: skip
    report = preflight(capsys, path, "--context", 64, "--backend", "sdpa", code=1)
    assert report["verdict"].startswith("NOT SERVED")
    assert "softcap" in report["verdict"]
    served = preflight(capsys, path, "--context", 64)
    assert {layer["backend"]["serves"]["attention"] for layer in served["layers"].values()} == {"eager"}
    assert "softcap" in next(iter(served["layers"].values()))["backend"]["passed_over"]["attention"]["sdpa"]


def test_memory_is_measured() -> None:
    megabytes = 200
    _, peak = memory.peak(lambda: torch.ones(megabytes, 2**20, dtype=torch.uint8), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not say how much memory a process has")
    assert 0.95 < peak / (megabytes * 2**20) < 1.2


def test_people_get_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plot.png"
    arguments = ["preflight", str(CONFIGS / "gpt-oss-20b.json"), "--context", "64", "--device", "cpu"]
    assert run([*arguments, "--png", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    words = (
        "12 × sliding_attention",
        "interpolated ÷ 32",
        "one layer, full_attention",
        "Cache of all layers",
        "INSIDE",
    )
    assert [word for word in words if word not in out] == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_without_matplotlib_there_is_a_sentence_and_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "longspan.cli.picture", None)
    path = small(tmp_path)
    assert run(["preflight", str(path), "--context", "16", "--json", "--png", str(tmp_path / "plot.png")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"]
    assert "no picture" in err
    assert "longspan[bench]" in err
    assert not (tmp_path / "plot.png").exists()


def test_the_default_device_is_one_that_is_there() -> None:
    assert machine.find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
