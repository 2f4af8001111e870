"""The package is what it says: complete, light to import, documented by what runs."""

import doctest
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("longspan.spec", "longspan.autotune", "longspan.backends", "longspan.cli", "longspan.laws")
# Not walked from `longspan` itself: an editable installation gives the namespace a path that cannot be listed.
MODULES = [
    module
    for folder in FOLDERS
    for module in (folder, *(found.name for found in walk_packages(import_module(folder).__path__, f"{folder}.")))
]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/autotune.md",
    "docs/benchmarks.md",
    "docs/compiled.md",
    "docs/notes.md",
)

# The installed wheel is tested in a directory that holds the tests alone.
from_sources = pytest.mark.skipif(not (ROOT / "spec").is_dir(), reason="needs the sources")


def configured() -> dict[str, dict[str, str]]:
    """What pyproject.toml tells setuptools."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


def shipped() -> dict[str, Path]:
    """Folder of every package that the folders of the checkout hold, by its installed name."""
    return {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts]): init.parent
        for name, folder in configured()["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }


def files() -> Iterator[Path]:
    """Every file of the folders that are installed."""
    for folder in configured()["package-dir"].values():
        yield from (file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)


@from_sources
def test_every_package_is_listed() -> None:
    assert set(FOLDERS) == set(configured()["package-dir"])
    assert sorted(shipped()) == sorted(configured()["packages"])


@from_sources
def test_every_file_lies_in_a_package() -> None:
    assert [file for file in files() if file.parent not in shipped().values()] == []


@from_sources
def test_every_data_file_is_in_the_wheel() -> None:
    patterns = configured()["package-data"]["*"]
    data = [file.name for file in files() if file.suffix != ".py"]
    assert "py.typed" in data
    assert [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@from_sources
def test_the_links_say_what_setuptools_is_told() -> None:
    links = {f"longspan.{link.name}": link.resolve() for link in (ROOT / ".namespace" / "longspan").iterdir()}
    assert links == {name: (ROOT / folder).resolve() for name, folder in configured()["package-dir"].items()}


@from_sources
def test_every_python_file_is_short_enough_to_read() -> None:
    sources = [
        file for top in configured()["package-dir"].values() for file in (ROOT / top.split("/")[0]).rglob("*.py")
    ]
    sources += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    longest = {file: 600 if {"flash", "hopper"} & set(file.parts) else 300 for file in sources}
    assert {str(file) for file, limit in longest.items() if len(file.read_text("utf-8").splitlines()) > limit} == set()


@from_sources
def test_no_file_hides_behind_a_name_that_says_nothing() -> None:
    # A module called triton would be imported in place of Triton by anything that runs inside the folder.
    assert [
        file for file in files() if file.stem in {"utils", "util", "helpers", "misc", "common", "triton", "torch"}
    ] == []


def fresh(code: str) -> str:
    """Run code in an interpreter of its own, from where the tests are, and return what it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def examples(name: str) -> int:
    """How many lines `>>>` the source of a module has."""
    spec = find_spec(name)
    source = "" if spec is None or spec.origin is None else Path(spec.origin).read_text("utf-8")
    return len(doctest.DocTestParser().get_examples(source))


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_documented_examples_run(name: str) -> None:
    # In a fresh interpreter: doctest overlooks the functions that are instrumented here.
    code = f"import doctest, importlib; print(*doctest.testmod(importlib.import_module('{name}')))"
    assert fresh(code) == f"0 {examples(name)}"


def test_modules_are_looked_for_everywhere() -> None:
    assert {"longspan.spec.rope", "longspan.spec.scaling.yarn", "longspan.backends.eager"} <= set(MODULES)


@pytest.mark.parametrize("statement", ["import longspan.spec", "import longspan.backends"])
def test_importing_brings_in_neither_triton_nor_transformers(statement: str) -> None:
    before = "import sys, torch, einops, jaxtyping; before = set(sys.modules)"
    brought = fresh(f"{before}; {statement}; print(set(sys.modules) - before)")
    assert "longspan.spec.rope" in brought
    assert not re.search(r"'(triton|transformers|hypothesis|matplotlib|rich|typer)[.']", brought)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_backend_without_kernels_of_its_own_needs_no_triton(backend: str) -> None:
    # None in sys.modules makes every import of it an ImportError.
    code = f"import sys; sys.modules['triton'] = None; from longspan import backends; print(backends.load('{backend}'))"
    assert f"longspan.backends.{backend}" in fresh(code)


@from_sources
def test_no_module_is_loaded_a_second_time_under_its_folder_name() -> None:
    everything = f"import sys; [__import__(name) for name in {MODULES}]"
    assert fresh(f"{everything}; print({{'spec', 'backends', 'cli', 'laws'}} & set(sys.modules))") == "set()"


@from_sources
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [link for link in local if not ((ROOT / page).parent / link.split("#")[0]).exists()] == []
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line[:1] == "#"
    }
    assert [link for link in links if link.startswith("#") and link[1:] not in headings] == []


@from_sources
def test_paths_named_in_readme_exist() -> None:
    named = re.findall(
        r"`((?:spec|backends|cli|tests|examples|tools)/[\w./-]+)`", (ROOT / "README.md").read_text("utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@from_sources
def test_examples_in_readme_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    fresh("\n".join(blocks))


@from_sources
def test_every_target_of_the_makefile_is_explained_and_real() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert sorted(re.findall(r"^(\w+):.* ## ", text, re.MULTILINE)) == sorted(phony)


def test_the_shapes_of_the_specification_are_checked_while_testing() -> None:
    pytest.importorskip("beartype")
    from jaxtyping import TypeCheckError  # noqa: PLC0415 - only where there is a checker
    from torch import zeros  # noqa: PLC0415

    from longspan import spec  # noqa: PLC0415

    with pytest.raises(TypeCheckError, match="parameter 'sink'"):
        spec.add_sink(spec.AttentionState(zeros(1, 2, 3, 4), zeros(1, 2, 3)), zeros(2, 1))
