"""`longspan tune`: measure which launch parameters are fastest on this GPU, once, and keep them."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from longspan.autotune import Case, Family, folders, forget, table
from longspan.autotune.device import Device, minor, offline, triton_version
from longspan.autotune.family import canonical, families
from longspan.autotune.finals import rows
from longspan.autotune.journal import Journal, Unusable, place
from longspan.autotune.plan import Entry, plan
from longspan.autotune.pool import Pool, Stillborn, Unkillable
from longspan.autotune.table import BadTable
from longspan.autotune.tuner import Tuner

from .page import Refused, console, print_json, refused
from .tune_page import Watch, conclude, report

SOURCES: Final = ("longspan.backends.flash.families:FAMILIES",)
GATE: Final = "longspan.cli.tune_gate:gate"
CLOCK: Final = "longspan.autotune.clock:Cuda"
COMPILER: Final = "longspan.autotune.compiler:Compiler"
MEMORY: Final = 6 << 30  # bytes that one compilation may take
ASKING: Final = 120.0  # seconds that a worker may take to describe its GPU


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command was asked for, and what it works with."""

    kernels: tuple[str, ...] = ()
    budget: float = 300.0
    model: Path | None = None
    context: int | None = None
    exhaustive: bool = False
    fresh: bool = False
    compile_only: bool = False
    arch: str | None = None
    export: Path | None = None
    as_json: bool = False
    png: Path | None = None
    workers: int | None = None
    sources: tuple[str, ...] = SOURCES
    gate: str = GATE
    clock: str = CLOCK
    compiler: str = COMPILER


def main(*, budget: str, merged: tuple[Path, Path] | None, export: Path | None, as_json: bool, **options: Any) -> int:  # noqa: ANN401 - fields of `Asked`
    """Tune, or merge two tables; return the exit code, 1 when a choice was wrong or a key has no winner.

    Raises:
        Refused: For what was asked in vain: an unknown kernel, no GPU, another tuner on it, a journal that is none.
    """
    if merged is not None:
        return merge(*merged, export)
    return tune(Asked(budget=seconds(budget), export=export, as_json=as_json, **options))


def seconds(text: str) -> float:
    """Read a time: ``90s``, ``5m``, ``1h``, or seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        found = float(text.rstrip("smh")) * units.get(text[-1:], 1.0)
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        refused("budget", "a time as 90s, 5m or 1h", repr(text))
    return found


def tune(asked: Asked) -> int:
    """Tune, and turn what stopped it into one sentence."""
    try:
        return run(asked)
    except (Unusable, Unkillable, Stillborn, BadTable, folders.Homeless) as trouble:
        raise Refused(str(trouble)) from trouble


def run(asked: Asked) -> int:
    """Tune, for what is refused in other words."""
    begun = time.monotonic()
    if find_spec("triton") is None:
        refused("the installation", "one with triton", "none; the spec, eager and sdpa need no tuning")
    with ExitStack() as stack:
        # Workers import PyTorch while this process does.
        compilers = stack.enter_context(compile_pool(asked))
        asking = None if asked.compile_only and asked.arch is not None else stack.enter_context(measuring_pool(asked))
        chosen = pick(families(asked.sources), asked.kernels)
        device, measurers = machine(asked, asking, stack)
        journal = Journal(place())
        stack.callback(journal.close)
        cases = None if asked.model is None else launched(asked.model, asked.context, chosen, device.arch)
        entries = plan(chosen, device, journal, triton_version(), fresh=asked.fresh, cases=cases)
        page = console()
        tuner = Tuner(entries=entries, journal=journal, device=device, compilers=compilers, measurers=measurers,
                      exhaustive=asked.exhaustive, begun=begun)  # fmt: skip
        with Watch(page, asked.budget, quiet=asked.as_json) as watch:
            watch.begin(tuner)
            tuner.watch = watch
            try:
                tuner.run(asked.budget)
            finally:  # whatever stops it, who has won by then serves
                keep(asked, device, entries, journal)
    found = report(tuner, asked.gate, asked.clock, asked.sources)
    if asked.png is not None:
        from .tune_picture import picture  # noqa: PLC0415 - matplotlib is an extra

        picture(found, asked.png)
    if asked.as_json:
        print_json(found)
    else:
        conclude(page, found)
    return 0 if found["ok"] else 1


def pick(known: dict[str, Family], names: Sequence[str]) -> list[Family]:
    """Look kernels up, by their whole names or a backend's."""
    for name in names:
        if not any(name in {full, full.partition(".")[0]} for full in known):
            refused("kernel", f"one of {', '.join(known)}, or a backend's name", repr(name))
    wanted = [full for full in known if not names or full in names or full.partition(".")[0] in names]
    return [known[full] for full in wanted]


def launched(config: Path, context: int | None, chosen: Sequence[Family], arch: str) -> dict[str, list[Case]]:
    """List what the layers of a published model launch, by kernel; each key once."""
    import torch  # noqa: PLC0415 - nothing else here needs it

    from .config import plans, read  # noqa: PLC0415

    if context is None:
        refused("context", "given with --model: the tokens that it is to serve", "none")
    found: dict[str, dict[str, Case]] = {family.name: {} for family in chosen}
    for layer in plans(read(config), context, torch.device("cpu")).values():
        sizes = {
            "heads": layer.layer.heads, "groups": layer.layer.groups, "head_dim": layer.layer.head_dim,
            "value_dim": layer.layer.value_dim, "itemsize": layer.dtype.itemsize, "causal": layer.layer.ahead == 0,
            "context": context,
        }  # fmt: skip
        for family in chosen:
            for case in family.sized(sizes, arch):
                found[family.name].setdefault(case.name, case)
    return {name: list(cases.values()) for name, cases in found.items()}


def machine(asked: Asked, asking: Pool | None, stack: ExitStack) -> tuple[Device, Pool | None]:
    """Find the GPU and lock it; with ``--compile-only`` there need be none."""
    if asking is None:
        try:
            return offline(str(asked.arch)), None
        except ValueError as error:
            raise Refused(str(error)) from None
    if asked.arch is not None:
        refused("arch", "given together with --compile-only alone: other machines are not measured here", asked.arch)
    found = answer(asking)
    if asked.compile_only:
        asking.close()
        return described(found), None
    stack.enter_context(alone(found["uuid"]))
    return described(found), asking


def measuring_pool(asked: Asked) -> Pool:
    """Start the one measuring worker, and ask it for its GPU."""
    servant = {"sources": list(asked.sources), "gate": asked.gate, "clock": asked.clock}
    pool = Pool("longspan.autotune.measurer:Measurer", servant)
    pool.submit(None, "describe", ASKING)
    return pool


def answer(pool: Pool) -> dict[str, Any]:
    """Hear what the measuring worker says of its GPU."""
    outcome = next(iter(pool.wait(ASKING)), None)
    if outcome is None or outcome.status != "ok":
        words = "it did not answer" if outcome is None else outcome.message
        msg = f"nothing can be measured here: {words}; --compile-only --arch sm_90 needs no GPU"
        raise Refused(msg)
    if outcome.value is None:
        msg = "nothing can be measured here: kernels are only interpreted (TRITON_INTERPRET=1)"
        raise Refused(msg)
    return outcome.value


def described(found: dict[str, Any]) -> Device:
    """Make a device of what a worker said of it."""
    return Device(**{name: value for name, value in found.items() if name != "uuid"})


def alone(uuid: str) -> AbstractContextManager[Any]:
    """Hold the lock of a GPU; the kernel drops it with the process, however that ends.

    Raises:
        Refused: When another tuner holds it.
    """
    path = folders.results() / "locks" / f"{uuid}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path, timeout=0).acquire()
    except Timeout:
        msg = f"another tuner measures on this GPU ({uuid}): two would measure each other; wait for it to end"
        raise Refused(msg) from None
    except NotImplementedError:  # what some file systems say to a lock
        msg = f"{path.parent} is on a file system without locks; set {folders.VARIABLE} to another folder"
        raise Refused(msg) from None
    except OSError as error:
        msg = f"{path.parent} cannot be written to: {error.strerror}; set {folders.VARIABLE} to another folder"
        raise Refused(msg) from None


def compile_pool(asked: Asked) -> Pool:
    """Start the compile workers: one a core, but for the coordinator's and the measuring worker's."""
    cores = len(os.sched_getaffinity(0))
    count = asked.workers or max(1, cores - (2 if cores > 4 and not asked.compile_only else 1 if cores > 2 else 0))
    # What a worker must not do: interpret, or look for threads that the others need.
    environment = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    pool = Pool(asked.compiler, {"sources": list(asked.sources)}, count=count, memory=MEMORY, environment=environment)
    pool.warm()
    return pool


def keep(asked: Asked, device: Device, entries: Sequence[Entry], journal: Journal) -> None:
    """Write the user's table, and the one that was asked for."""
    if asked.compile_only:
        return
    made, out = rows(entries, journal, triton_version()), thrown_out(entries)
    paths = [folders.tables() / f"{device.slug}-triton-{minor(triton_version())}.json"]
    if asked.export is not None:
        paths.append(asked.export / f"{device.slug}.json" if asked.export.is_dir() else asked.export)
    for path in paths:
        with told(path):
            old = known(path, device)
            kept = remaining(old, made, out)
            if made or len(kept) < len(old):
                table.write(path, table.make(device, [*kept, *made]))
        forget()


def thrown_out(entries: Sequence[Entry]) -> set[tuple[str, ...]]:
    """Family, key, code and choice of all that must not serve, whenever it won."""
    return {
        (entry.family.name, entry.case.name, entry.digest, name)
        for entry in entries for name, one in entry.candidates.items() if one.state == "out"
    }  # fmt: skip


def known(path: Path, device: Device) -> list[dict[str, Any]]:
    """Return the rows of a table that is there; none of one that is damaged, which is made from the journal."""
    try:
        old = table.read(path) if path.exists() else table.make(device, [])
    except BadTable:
        return []
    return old["rows"] if old["device"]["slug"] == device.slug else []


def remaining(old: list[dict[str, Any]], made: list[dict[str, Any]], out: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Return the rows that stay beside new ones: those of other keys whose choices are not out."""
    names = {table.order(row) for row in made}
    return [
        row for row in old
        if table.order(row) not in names and (*table.order(row), row["digest"], canonical(row["choice"])) not in out
    ]  # fmt: skip


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror}; what was measured is in the journal"
        raise Refused(msg) from None


def merge(first: Path, second: Path, out: Path | None) -> int:
    """Merge two tables into one, printed or written."""
    try:
        merged = table.merge(table.read(first), table.read(second))
    except BadTable as bad:
        raise Refused(str(bad)) from None
    path = second if out is None else out
    with told(path):
        table.write(path, merged)
    console().print(f"{len(merged['rows'])} rows in {path}")
    return 0
