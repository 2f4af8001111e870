"""Bad input of the command: one clear sentence on stderr, exit code 2, no traceback."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from longspan.cli.main import run

LLAMA = {
    "model_type": "llama", "torch_dtype": "float32", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 10000.0,
}  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command on bad input, and return the one sentence that it says."""
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("longspan: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def write(folder: Path, **changed: Any) -> Path:
    """Write a small config whose keys are changed; None takes one away."""
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in (LLAMA | changed).items() if value is not None}), "utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "llama", "hid', "line 1, column"),
        ("", "stops being JSON at line 1, column 1"),
        ("[1, 2]", "must be a JSON object, the contents of a config.json, got a list"),
        ("null", "got null"),
        ('"text"', "got a text"),
    ],
)
def test_what_is_no_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, "utf-8")
    assert words in said(capsys, "preflight", path, "--context", 16)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.json, which does not exist" in said(capsys, "preflight", tmp_path / "nowhere.json", "--context", 16)


def test_a_directory_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "got the directory" in said(capsys, "preflight", tmp_path, "--context", 16)


def test_bytes_that_are_no_text_are_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00{")
    assert "UTF-8" in said(capsys, "preflight", path, "--context", 16)


@pytest.mark.parametrize("context", ["0", "-5", str(2**31)])
def test_a_context_without_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], context: str) -> None:
    message = said(capsys, "preflight", write(tmp_path), "--context", context)
    assert f"context must be a number of tokens from 1 to {2**31 - 1}, got {context}" in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 1}}, "warp"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"head_dim": 7}, "7"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"max_position_embeddings": -1, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "-1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], words: str
) -> None:
    assert words in said(capsys, "preflight", write(tmp_path, **changed), "--context", 16)


@pytest.mark.parametrize("verb", ["verify", "preflight"])
def test_an_unknown_backend_is_answered_with_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    rest = (write(tmp_path), "--context", 16) if verb == "preflight" else ()
    message = said(capsys, verb, *rest, "--backend", "warp")
    assert "backend must be one of" in message
    assert "eager" in message
    assert "'warp'" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fly",), "command must be one of backends, verify, preflight, tune, got 'fly'"),
        (("verify", "--law", "gravity"), "attention_is_its_definition"),
        (("verify", "--mutant", "nobody"), "causal_from_the_top_left"),
        (("verify", "--seconds", "0"), "seconds must be a number above 0, got 0"),
        (("verify", "--seconds", "nan"), "seconds must be a number above 0, got nan"),
        (("verify", "--seconds", "soon"), "soon"),
        (("verify", "--device", "tpu:0"), "device must be one of cpu"),
        (("verify", "--device", "cuda:99"), "device must be one of cpu"),
        (("backends", "--device", "meta"), "device must be one of cpu"),
        (("verify", "--nonsense"), "--nonsense"),
        (("preflight",), "preflight --help"),
        (("preflight", "config.json"), "--context"),
        (("preflight", "config.json", "--context", "many"), "many"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in said(capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing/plot.png", "a folder that exists"), ("plot.pdf", "ends in .png"), ("folder.png", "the directory")],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert words in said(capsys, "preflight", write(tmp_path), "--context", 16, "--png", tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_picture_without_leave_to_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    path = tmp_path / "locked" / "plot.png"
    assert "can be written" in said(capsys, "preflight", write(tmp_path), "--context", 16, "--png", path)
