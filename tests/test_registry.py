"""Loading backends by name, and the promise that a named backend never hands a problem on."""

import inspect
from typing import Any

import pytest
import torch

from longspan import backends
from longspan.backends import Backend, Unsupported, auto, registry
from longspan.backends.registry import module

EVERY = (*backends.NAMES, "auto")
TOKENS = torch.zeros(1, 1, 3, 8)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"one of {', '.join(EVERY)}, got 'fastest'"):
        _ = backends.load("fastest")


def test_the_specification_is_the_last_resort() -> None:
    assert backends.NAMES[-1] == "eager"
    assert len(set(backends.NAMES)) == len(backends.NAMES)
    assert "eager" in backends.available()


@pytest.mark.parametrize("name", EVERY)
def test_every_backend_has_every_operation(name: str) -> None:
    backend = module(name)
    assert isinstance(backend, Backend)
    for operation in (*backends.OPERATIONS, "declines", "unavailable"):
        assert callable(getattr(backend, operation))
        assert operation in getattr(backend, "__all__", dir(backend))


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("operation", backends.OPERATIONS)
def test_positional_arguments_have_the_specifications_names(name: str, operation: str) -> None:
    given = inspect.signature(getattr(module(name), operation)).parameters.values()
    meant = inspect.signature(getattr(module("eager"), operation)).parameters.values()
    positional = [
        [x.name for x in side if x.kind in {x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD, x.VAR_POSITIONAL}]
        for side in (given, meant)
    ]
    assert positional[0] == positional[1]


@pytest.mark.parametrize("name", EVERY)
def test_a_backend_loads_as_its_module_or_says_why_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = module(name)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    assert backends.load(name) is backend
    monkeypatch.setattr(backend, "unavailable", lambda: "needs a quantum computer")
    assert name not in backends.available()
    with pytest.raises(Unsupported, match="needs a quantum computer") as refusal:
        _ = backends.load(name)
    assert name not in refusal.value.alternatives
    assert set(refusal.value.alternatives) == set(backends.NAMES) - {name}


def test_a_backend_whose_package_is_absent_says_so_and_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.NEEDS, "flash", ("a_package_that_nobody_has",))
    monkeypatch.setattr(registry, "module", lambda name: pytest.fail(f"{name} was imported"))
    assert registry.unavailable("flash") == "flash needs a_package_that_nobody_has, which is not installed"
    with pytest.raises(Unsupported, match="needs a_package_that_nobody_has"):
        _ = backends.load("flash")


def test_a_refusal_carries_its_reason_and_its_alternatives() -> None:
    refusal = Unsupported("no softcap", alternatives=("eager", "sdpa"))
    assert isinstance(refusal, NotImplementedError)
    assert not isinstance(refusal, ValueError)
    assert (refusal.reason, refusal.alternatives) == ("no softcap", ("eager", "sdpa"))
    assert str(refusal) == "no softcap (may be served by: eager, sdpa)"
    assert str(Unsupported("nothing can", alternatives=())) == "nothing can (may be served by: no backend)"


@pytest.mark.parametrize("name", registry.available())
def test_a_named_backend_never_falls_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.load(name)

    def poison(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"{name} handed {len(args)} arguments and {list(kwargs)} to another backend")

    for other in (module(x) for x in EVERY if x != name):
        for operation in backends.OPERATIONS:
            monkeypatch.setattr(other, operation, poison)
    for options in ({}, {"softcap": 5.0}, {"alibi": torch.ones(1)}, {"deterministic": True}):
        for dtype in (torch.float32, torch.float64):
            q = TOKENS.to(dtype)
            declined = backend.declines("attention", q, q, q, **options)
            if declined is None:
                assert backend.attention(q, q, q, **options).out.shape == q.shape
            else:
                with pytest.raises(Unsupported) as refusal:
                    _ = backend.attention(q, q, q, **options)
                assert refusal.value.reason == declined


def test_auto_falls_back_and_nobody_else() -> None:
    assert auto.declines("attention", TOKENS, TOKENS, TOKENS, softcap=5.0) is None
    assert module("sdpa").declines("attention", TOKENS, TOKENS, TOKENS, softcap=5.0) is not None
