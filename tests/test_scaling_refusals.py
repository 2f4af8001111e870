"""Meaningless parameters of a scaling method are refused by its name and theirs."""

from collections.abc import Callable
from typing import Any, Final

import pytest

from longspan.spec import Rotation, scaling

SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 4.0, 8.0, 16.0]
NAN, INF = float("nan"), float("inf")
YARN: Final[dict[str, Any]] = {"factor": 2, "original": 64}
LONGROPE: Final[dict[str, Any]] = {"short_factor": SHORT, "long_factor": LONG, "original": 64, "length": 64}

MEANINGLESS: Final[list[tuple[Callable[..., Rotation], int, dict[str, Any], str]]] = [
    *[(method, d, {}, "even") for method in (scaling.none, scaling.proportional) for d in (0, 7, -2)],
    *[(scaling.none, 8, {"base": base}, "base") for base in (0, -1, NAN, INF)],
    *[(scaling.linear, 8, {"factor": factor}, "factor") for factor in (0, -2, NAN, INF)],
    (scaling.ntk, 8, {"factor": 0}, "factor"),
    (scaling.ntk, 2, {"factor": 2}, "at least 4"),
    (scaling.dynamic_ntk, 2, {"factor": 2, "original": 64, "length": 64}, "at least 4"),
    (scaling.dynamic_ntk, 8, {"factor": 2, "original": 0, "length": 64}, "original"),
    (scaling.dynamic_ntk, 8, {"factor": 2, "original": 64, "length": -1}, "length"),
    (scaling.ntk_by_parts, 8, {**YARN, "alpha": 32, "beta": 32}, "below beta"),
    (scaling.ntk_by_parts, 8, {**YARN, "alpha": 0}, "alpha"),
    (scaling.yarn_paper, 8, {**YARN, "alpha": 33}, "below beta"),
    (scaling.yarn, 8, {**YARN, "beta_fast": 1, "beta_slow": 1}, "below beta_fast"),
    (scaling.yarn, 8, {**YARN, "beta_fast": 1, "beta_slow": 32}, "below beta_fast"),
    (scaling.yarn, 8, {**YARN, "factor": 0}, "factor"),
    (scaling.yarn, 8, {**YARN, "original": 0}, "original"),
    (scaling.yarn, 8, {**YARN, "base": 1}, "above 1"),
    (scaling.llama3, 8, {**YARN, "low_freq_factor": 4, "high_freq_factor": 1}, "at most high_freq_factor"),
    (scaling.llama3, 8, {**YARN, "low_freq_factor": 0}, "low_freq_factor"),
    (scaling.longrope, 8, {**LONGROPE, "long_factor": LONG[:3]}, "long_factor must be 4 .* got 3"),
    (scaling.longrope, 8, {**LONGROPE, "short_factor": [1, 1, 0, 1]}, "short_factor .* one of them 0"),
    (scaling.longrope, 8, {**LONGROPE, "length": -1}, "length"),
    (scaling.longrope, 8, {**LONGROPE, "original": 1}, "original"),
    (scaling.longrope, 8, {**LONGROPE, "attention_factor": 1, "short_mscale": 1}, "both"),
    (scaling.proportional, 8, {"fraction": 1.5}, "at most 1"),
    (scaling.proportional, 8, {"fraction": 0}, "fraction"),
]


@pytest.mark.parametrize(("method", "d", "parameters", "message"), MEANINGLESS)
def test_meaningless_parameters_are_refused_by_name(
    method: Callable[..., Rotation], d: int, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        method(d, **parameters)
    assert method.__name__ in str(error.value)
