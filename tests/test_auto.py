"""The backend that picks a backend: which, why, and that it says so."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given

from longspan import backends, spec
from longspan.backends import auto, registry
from longspan.laws.problems import Attention
from longspan.laws.strategies import attentions
from longspan.spec import masks

TOKENS = torch.zeros(1, 1, 3, 8)


class Fake(SimpleNamespace):
    """A backend that says what it is told to, and answers every operation with its own name."""

    def __init__(self, name: str, *, lacks: str | None = None, refuses: str | None = None) -> None:
        super().__init__(
            unavailable=lambda: lacks,
            declines=lambda operation, *args, **kwargs: refuses,  # noqa: ARG005
            **dict.fromkeys(backends.OPERATIONS, lambda *args, **kwargs: name),  # noqa: ARG005
        )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Put fake backends, two of which are no good, in place of the real ones."""
    table = {
        "absent": Fake("absent", lacks="needs another machine"),
        "proud": Fake("proud", refuses="has no softcap"),
        "good": Fake("good"),
        "last": Fake("last"),
    }
    monkeypatch.setattr(auto, "NAMES", tuple(table))
    monkeypatch.setattr(registry, "module", table.__getitem__)
    return table


@pytest.mark.parametrize("operation", backends.OPERATIONS)
def test_the_first_backend_that_does_not_decline_serves(fakes: dict[str, Fake], operation: str) -> None:
    assert auto.choose(operation, TOKENS) == (
        "good", {"absent": "needs another machine", "proud": "has no softcap"},
    )  # fmt: skip
    arguments = {"merge": 1, "add_sink": 2, "rotate": 1, "rerotate": 1, "rotate_qk": 2}.get(operation, 3)
    assert getattr(auto, operation)(*[TOKENS] * arguments) == "good"
    fakes["proud"].declines = lambda *args, **kwargs: None  # noqa: ARG005
    assert getattr(auto, operation)(*[TOKENS] * arguments) == "proud"


@pytest.mark.usefixtures("fakes")
def test_a_notice_says_what_was_picked_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="longspan"):
        auto.attention(TOKENS, TOKENS, TOKENS)
    (record,) = caplog.records
    assert record.name == "longspan"
    assert record.getMessage() == "attention runs on good: absent: needs another machine; proud: has no softcap"


def test_the_first_choice_is_taken_in_silence(caplog: pytest.LogCaptureFixture, fakes: dict[str, Fake]) -> None:
    del fakes
    with caplog.at_level(logging.INFO, logger="longspan"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "NAMES", ("good", "last"))
        auto.attention(TOKENS, TOKENS, TOKENS)
    assert not caplog.records


def test_when_all_decline_every_reason_is_given(fakes: dict[str, Fake]) -> None:
    for name in ("good", "last"):
        fakes[name].declines = lambda *args, **kwargs: "is asleep"  # noqa: ARG005
    said = "absent: needs another machine; proud: has no softcap; good: is asleep; last: is asleep"
    assert auto.declines("merge") == said
    with pytest.raises(backends.Unsupported) as refusal:
        auto.merge()
    assert refusal.value.reason == said
    assert refusal.value.alternatives == ()


def test_kernels_that_are_interpreted_are_for_tests_alone(fakes: dict[str, Fake]) -> None:
    fakes["good"].INTERPRETED = True
    assert auto.choose("merge").name == "last"
    assert auto.choose("merge").declined["good"] == "good is interpreted on this machine, for tests"


def test_auto_is_unavailable_only_where_every_backend_is(fakes: dict[str, Fake]) -> None:
    assert auto.unavailable() is None
    for fake in fakes.values():
        fake.unavailable = lambda: "no machine"
    assert auto.unavailable() == "absent: no machine; proud: no machine; good: no machine; last: no machine"


def test_an_unknown_operation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"rotate, .*add_sink, got 'divide'"):
        _ = auto.choose("divide")


@given(attentions())
def test_what_is_chosen_serves(problem: Attention) -> None:
    of = problem.inputs()
    name, declined = auto.choose("attention", *of.arguments, **of.options)
    assert list(declined) == list(backends.NAMES[: backends.NAMES.index(name)]), "a faster backend was passed over"
    state = auto.attention(*of.arguments, **of.options)
    chosen = backends.load(name).attention(*of.arguments, **of.options)
    assert torch.equal(state.out, chosen.out)
    assert torch.equal(state.lse, chosen.lse)


@pytest.mark.parametrize(
    "changed",
    [
        {"k": TOKENS.expand(1, 2, 3, 8), "v": TOKENS.expand(1, 2, 3, 8)},
        {"q": TOKENS.half()},
        {"softcap": 0.0},
        {"mask": masks.lengths([1, 2])},
    ],
    ids=["heads", "dtype", "softcap", "lengths"],
)
def test_a_meaningless_problem_is_refused_in_the_specifications_words(changed: dict[str, Any]) -> None:
    options = {"q": TOKENS, "k": TOKENS, "v": TOKENS, **changed}
    with pytest.raises(ValueError, match="must be") as expected:
        _ = spec.attention(**options)
    with pytest.raises(ValueError, match="must be") as found:
        _ = auto.attention(**options)
    assert str(found.value) == str(expected.value)


def test_a_missing_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        auto.attention(TOKENS)  # pyright: ignore[reportCallIssue]
