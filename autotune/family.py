"""What the tuner knows of a kernel: a family of launches that differ only in a choice.

A choice, a key and a problem are plain data: mappings from names to numbers, texts and truth values. What they mean
is the family's own business, which arrives here as a value or as the text ``module:name`` to import it by.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

Value = int | float | str | bool
Values = Mapping[str, Value]


def canonical(values: Mapping[str, Any]) -> str:
    """Write plain data as one line that is the same for equal data."""
    return json.dumps(dict(values), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def phrase(values: Values) -> str:
    """Write plain data for people: ``tile_m 64, masked``."""
    said = (
        name if value is True else f"not {name}" if value is False else f"{name} {value}"
        for name, value in values.items()
    )
    return ", ".join(part.replace("_", " ") for part in said)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A key, and the problem that stands for it while it is tuned.

    Attributes:
        key: What a choice is looked up by.
        problem: Sizes of the launches that are timed: kernels of at most about ten milliseconds.
        variant: What compiled code depends on beside the choice; cases that share it share their compilations.
    """

    key: Values
    problem: Values
    variant: Values

    @property
    def name(self) -> str:
        """The key as one line."""
        return canonical(self.key)

    @property
    def fields(self) -> dict[str, Any]:
        """What it is made of, as workers take it."""
        return {"key": dict(self.key), "problem": dict(self.problem), "variant": dict(self.variant)}

    @property
    def posed(self) -> dict[str, Any]:
        """What was measured, as the journal knows it: times of a key's other problems are none of this one."""
        return {"key": dict(self.key), "problem": dict(self.problem)}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kernel whose launch leaves a choice.

    Attributes:
        name: Under which its choices are looked up, as ``flash.forward``.
        operation: What the gate is to check, by a name that the gate knows.
        backend: Module whose functions run the kernel, by import string; for the gate.
        sources: The functions that are compiled, as ``module:name``; what they use is found from them.
        cases: From an architecture to what is tuned there.
        space: From a case and an architecture to its choices, all of which may be illegal.
        heuristic: From a case and an architecture to the choice that serves without tuning.
        prepare: From a case, the name of a device and whether to fill in numbers, to a launch on arguments of its own,
            which returns what it wrote; its choice is the one that `override` says.
        cost: A guess that orders choices, cheapest first. It never rejects one.
        sized: From the sizes of a model's layer (heads, groups, head_dim, value_dim, itemsize, causal) and an
            architecture to the cases that it launches; none of a kernel that it does not.
        relatives: From a case and an architecture to cases of the same key that compile other code. A winner that is
            not the heuristic must pass the gate on these, too.
    """

    name: str
    operation: str
    backend: str
    sources: tuple[str, ...]
    cases: Callable[[str], Sequence[Case]]
    space: Callable[[Case, str], Sequence[Values]]
    heuristic: Callable[[Case, str], Values]
    prepare: Callable[[Case, str, bool], Callable[[], Any]]
    cost: Callable[[Case, Values, str], float] = field(default=lambda case, choice, arch: 0.0)  # noqa: ARG005
    sized: Callable[[Values, str], Sequence[Case]] = field(default=lambda sizes, arch: ())  # noqa: ARG005
    relatives: Callable[[Case, str], Sequence[Case]] = field(default=lambda case, arch: ())  # noqa: ARG005


def imported(name: str) -> Any:
    """Import ``module:name``.

    Raises:
        ValueError: For text of another form, or that names nothing.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        msg = f"an import string must be module:name, got {name!r}"
        raise ValueError(msg)
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        msg = f"an import string must name what can be imported, got {name!r}: {error}"
        raise ValueError(msg) from error


def families(sources: Sequence[str]) -> dict[str, Family]:
    """Import families by strings that name sequences of them; by their names, in order.

    Raises:
        ValueError: For a name that two families share.
    """
    found: dict[str, Family] = {}
    for source in sources:
        for family in imported(source):
            if family.name in found:
                msg = f"two families are named {family.name!r}"
                raise ValueError(msg)
            found[family.name] = family
    return found
