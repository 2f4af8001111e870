"""README's tables say what the code does: every law by its sentence, every backend by what it declines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from longspan import backends
from longspan.laws import LAWS
from longspan.laws.mutants import MUTANTS
from longspan.spec import masks

README: Final = Path(__file__).parents[1] / "README.md"
DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the sources")


def rows(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table under a heading."""
    section = README.read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def heads(d: int = 64, dtype: torch.dtype = torch.float32, tokens: int = 8) -> list[torch.Tensor]:
    """Draw q, k and v."""
    return [torch.randn(1, 2, tokens, d, device=DEVICE).to(dtype) for _ in range(3)]


def native(of: Any) -> torch.dtype:
    """A dtype that a backend serves."""
    return torch.float32 if of.declines("attention", *heads()) is None else torch.bfloat16


def asked(**options: Any) -> Callable[[Any], str | None]:
    """Ask about an option of attention."""
    return lambda of: of.declines("attention", *heads(dtype=native(of)), **options)


def head(d: int, e: int | None = None) -> Callable[[Any], str | None]:
    """Ask about a head dimension, and one of the values."""
    return lambda of: of.declines("attention", *heads(d, native(of))[:2], heads(e or d, native(of))[0])


def wide(tokens: int) -> Callable[[Any], str | None]:
    """Ask about a head dimension above 256, of few queries or many."""
    return lambda of: of.declines("attention", *heads(320, native(of), tokens))


# What a backend may decline, by the words of README's table.
FEATURES: Final[dict[str, Callable[[Any], str | None]]] = {
    "softcap": asked(softcap=30.0),
    "ALiBi": asked(alibi=torch.full((2,), 0.5, device=DEVICE)),
    "sinks": asked(sink=torch.zeros(2, device=DEVICE)),
    "spans": asked(mask=masks.spans(torch.zeros(8, dtype=torch.int64), torch.full((8,), 8))),
    "documents": asked(mask=masks.documents([3, 5]) & masks.causal()),
    "windows with first keys": asked(mask=masks.window(3, keep_first=2) & masks.causal()),
    "prefixes": asked(mask=masks.prefix(3)),
    "chunks": asked(mask=masks.chunks(3) & masks.causal()),
    "q_offset": asked(q_offset=torch.tensor([2], device=DEVICE)),
    "negative scale": asked(scale=-1.0),
    "deterministic": asked(deterministic=True),
    "head dims that are no multiple of 8": head(12),
    "head dims above 256": wide(8),
    "head dims above 256 of many queries": lambda of: None if wide(8)(of) else wide(65)(of),
    "value dims of their own": head(64, 40),
    "float32": lambda of: of.declines("attention", *heads()),
    "float64": lambda of: of.declines("attention", *heads(dtype=torch.float64)),
    "bfloat16": lambda of: of.declines("attention", *heads(dtype=torch.bfloat16)),
    "attention_paged": lambda of: of.declines(
        "attention_paged", torch.randn(4, 2, 64, device=DEVICE).to(native(of)), torch.tensor([4], device=DEVICE),
        *(torch.randn(3, 2, 16, 64, device=DEVICE).to(native(of)) for _ in range(2)),
        torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE), torch.tensor([20], dtype=torch.int32, device=DEVICE),
    ),
}  # fmt: skip


def test_every_law_is_listed_by_its_sentence() -> None:
    assert rows("What is held to be true") == [[law.sentence.replace("|", r"\|"), f"`{law.name}`"] for law in LAWS]


def test_the_number_of_mutants_is_the_one_stated() -> None:
    assert f"{len({mutant.name for mutant in MUTANTS})} planted bugs" in README.read_text("utf-8")


def test_every_backend_is_listed() -> None:
    assert [row[0].strip("`") for row in rows("Backends")] == list(backends.NAMES)


@pytest.mark.parametrize("name", backends.available())
def test_a_backend_declines_what_its_row_says_and_nothing_else(name: str) -> None:
    row = next(row for row in rows("Backends") if row[0].strip("`") == name)
    listed = {item.strip() for item in row[-1].split(";")} - {"nothing"}
    other = {"cpu": " (CUDA)", "cuda": " (CPU)"}[DEVICE]
    here = {item.removesuffix(" (CPU)").removesuffix(" (CUDA)") for item in listed if not item.endswith(other)}
    assert here <= set(FEATURES), f"unknown features: {here - set(FEATURES)}"
    backend = backends.load(name)
    assert {feature for feature, ask in FEATURES.items() if ask(backend) is not None} == here
