"""A digest changes with what a kernel computes, and with nothing else."""

import subprocess
import sys
from importlib import import_module
from itertools import count
from pathlib import Path

import pytest

from longspan.autotune.digest import digest

NUMBERS = count()
SOURCE = '''
FACTOR = 3

def decorated(f):
    return f

def helper(x):
    return x * FACTOR

def kernel(x, n=2):
    """What it does."""
    y = helper(x) + n  # a comment
    return y
'''


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201 - a function of the test
    """Write sources to a module and return the digest of its kernel."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def digest_of(source: str) -> str:
        name = f"digested_{next(NUMBERS)}"
        # The digest is of qualified names, too: the module is to be one and the same.
        (tmp_path / f"{name}.py").write_text(source)
        module = import_module(name)
        for function in (module.kernel, module.helper):
            function.__module__ = "digested"
        return digest([module.kernel])

    return digest_of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\ndef helper", "\n\n\n\ndef helper"),
        ("  # a comment", ""),
        ("What it does.", "What else it does."),
        ("helper(x) + n", "(helper( x )) + n"),
        ('    """What it does."""\n', ""),
        ("\ndef helper", "\n@decorated\ndef helper"),
    ],
)
def test_looks_do_not_count(written, old: str, new: str) -> None:  # noqa: ANN001
    assert old in SOURCE
    assert written(SOURCE) == written(SOURCE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [("helper(x) + n", "helper(x) - n"), ("x * FACTOR", "x + FACTOR"), ("FACTOR = 3", "FACTOR = 4"), ("n=2", "n=5")],
)
def test_code_counts_with_what_it_uses(written, old: str, new: str) -> None:  # noqa: ANN001
    assert old in SOURCE
    assert written(SOURCE) != written(SOURCE.replace(old, new))


def test_kernels_have_one_digest_interpreted_or_not() -> None:
    code = (
        "from longspan.autotune.digest import digest; from longspan.autotune.family import imported\n"
        "from longspan.backends.flash.choices import SOURCES\n"
        "print({name: digest(map(imported, sources)) for name, sources in SOURCES.items()})"
    )
    found = {
        subprocess.run(  # noqa: S603 - our own source
            [sys.executable, "-c", f"import os; os.environ['TRITON_INTERPRET'] = '{flag}'\n{code}"],
            check=True, capture_output=True, text=True, timeout=120,
        ).stdout
        for flag in "01"
    }  # fmt: skip
    assert len(found) == 1
    assert len(set(eval(found.pop()).values())) >= 3  # noqa: S307 - what was printed above
