"""Planted bugs in scaling methods: each must break a table that a published checkpoint was trained with."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from longspan.spec import Rotation, hf, inv_freq, scaling

ENTRIES: Final = json.loads((Path(__file__).parent / "vectors" / "rope.json").read_text("utf-8"))["entries"]
LENGTHS: Final = {
    "short": 4096,
    "long": 131_072,
    "seq_len=32768": 32_768,
    "seq_len=65536": 65_536,
    "seq_len=131072": 131_072,
}
YARN, LONGROPE = scaling.yarn, scaling.longrope


def tables_hold() -> None:
    """Read every published configuration, and compare speeds and attention factors with its table."""
    for entry in ENTRIES:
        for name, table in entry["tables"].items():
            made = hf.rotations(entry["config"], length=LENGTHS.get(name, 4096))
            read = made[name if name in made else "all"]
            expected = torch.tensor(table["inv_freq"], dtype=torch.float64)
            assert torch.allclose(read.inv_freq, expected, rtol=1e-12, atol=0), f"{entry['model']}: speeds of {name}"
            close = math.isclose(read.attention_factor, table["attention_factor"], rel_tol=1e-12)
            assert close, f"{entry['model']}: attention factor of {name}"


def yarn_without_attention_factor(d: int, **keys: Any) -> Rotation:
    """Blend the speeds, and forget the temperature."""
    return replace(YARN(d, **keys), attention_factor=1.0)


def yarn_always_truncated(d: int, **keys: Any) -> Rotation:
    """Round the ramp to whole planes though the config says not to."""
    return YARN(d, **{**keys, "truncate": True})


def yarn_never_truncated(d: int, **keys: Any) -> Rotation:
    """Keep the ramp's fractional ends."""
    return YARN(d, **{**keys, "truncate": False})


def yarn_by_the_papers_ramp(d: int, **keys: Any) -> Rotation:
    """Ramp over turns, and not over planes."""
    own = {name: keys[name] for name in ("base", "factor", "original") if name in keys}
    return replace(scaling.yarn_paper(d, **own), attention_factor=YARN(d, **keys).attention_factor)


def yarn_with_the_ramp_reversed(d: int, **keys: Any) -> Rotation:
    """Interpolate the fast planes, and leave the slow ones."""
    made = YARN(d, **keys)
    trained = inv_freq(d, base=keys["base"])
    return replace(made, inv_freq=trained + trained / keys["factor"] - made.inv_freq)


def yarn_by_its_own_temperature(d: int, **keys: Any) -> Rotation:
    """Ignore mscale and any attention factor that is given."""
    return YARN(d, **{**keys, "attention_factor": None, "mscale": None, "mscale_all_dim": None})


def longrope_with_its_factors_swapped(d: int, **keys: Any) -> Rotation:
    """Take the short factors for the long ones."""
    return LONGROPE(d, **{**keys, "short_factor": keys["long_factor"], "long_factor": keys["short_factor"]})


def longrope_always_long(d: int, **keys: Any) -> Rotation:
    """Use the long factors at every length."""
    return LONGROPE(d, **{**keys, "length": keys["original"] + 1})


def longrope_one_token_early(d: int, **keys: Any) -> Rotation:
    """Switch at the trained length, and not after it."""
    return LONGROPE(d, **{**keys, "length": keys["length"] + 1})


def longrope_without_attention_factor(d: int, **keys: Any) -> Rotation:
    """Divide the speeds, and forget the magnitude."""
    return replace(LONGROPE(d, **keys), attention_factor=1.0)


def linear_speeds_up(d: int, *, base: float, factor: float, **keys: Any) -> Rotation:
    """Multiply the speeds by the factor."""
    return Rotation(inv_freq(d, base=base, **keys) * factor)


def dynamic_ntk_at_the_trained_length(d: int, **keys: Any) -> Rotation:
    """Ignore the length."""
    return scaling.none(d, base=keys["base"])


def dynamic_ntk_by_the_factor(d: int, **keys: Any) -> Rotation:
    """Scale by the factor whatever the length."""
    return scaling.ntk(d, base=keys["base"], factor=keys["factor"])


def llama3_without_a_blend(d: int, **keys: Any) -> Rotation:
    """Divide every plane below the high edge, with no smooth part."""
    trained = inv_freq(d, base=keys["base"])
    turns = trained * keys["original"] / (2 * math.pi)
    return Rotation(torch.where(turns > keys.get("high_freq_factor", 4), trained, trained / keys["factor"]))


def proportional_over_what_turns(d: int, **keys: Any) -> Rotation:
    """Take exponents over the coordinates that turn, and not over the head."""
    made = scaling.none(d, base=keys["base"]).inv_freq
    moving = int((PROPORTIONAL(d, **keys).inv_freq > 0).sum())
    return Rotation(torch.cat([inv_freq(2 * moving, base=keys["base"]), torch.zeros_like(made[moving:])]))


PROPORTIONAL = scaling.proportional

MUTANTS: Final[list[tuple[str, Callable[..., Rotation], str]]] = [
    ("yarn", yarn_without_attention_factor, "attention factor"),
    ("yarn", yarn_always_truncated, "gpt-oss-20b: speeds"),
    ("yarn", yarn_never_truncated, "speeds"),
    ("yarn", yarn_by_the_papers_ramp, "speeds"),
    ("yarn", yarn_with_the_ramp_reversed, "speeds"),
    ("yarn", yarn_by_its_own_temperature, "DeepSeek-V2-Lite: attention factor"),
    ("longrope", longrope_with_its_factors_swapped, "speeds of short"),
    ("longrope", longrope_always_long, "speeds of short"),
    ("longrope", longrope_one_token_early, "speeds of short"),
    ("longrope", longrope_without_attention_factor, "attention factor"),
    ("linear", linear_speeds_up, "airoboros-33b-2.1: speeds"),
    ("dynamic_ntk", dynamic_ntk_at_the_trained_length, "speeds of seq_len=65536"),
    ("dynamic_ntk", dynamic_ntk_by_the_factor, "speeds of seq_len=32768"),
    ("llama3", llama3_without_a_blend, "Llama-3.1-8B: speeds"),
    ("proportional", proportional_over_what_turns, "speeds of full_attention"),
]


@pytest.mark.parametrize(("method", "mutant", "message"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS])
def test_a_published_table_rejects(
    method: str, mutant: Callable[..., Rotation], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables_hold()
    monkeypatch.setattr(scaling, method, mutant)
    with pytest.raises(AssertionError, match=message):
        tables_hold()
