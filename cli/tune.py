"""`longspan tune`: measure which launch parameters are fastest on this GPU, once, and keep them."""

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from longspan.autotune import Case, Family, folders
from longspan.autotune.device import Device, offline, triton_version
from longspan.autotune.family import families
from longspan.autotune.journal import Journal, Unusable, place
from longspan.autotune.plan import plan
from longspan.autotune.pool import Pool, Stillborn, Unkillable
from longspan.autotune.table import BadTable
from longspan.autotune.tuner import Tuner

from .page import Refused, console, print_json, refused
from .tune_lock import alone
from .tune_page import Watch, conclude, report
from .tune_tables import keep, merge

SOURCES: Final = ("longspan.backends.flash.families:FAMILIES", "longspan.backends.hopper.families:FAMILIES")
GATE: Final = "longspan.cli.tune_gate:gate"
CLOCK: Final = "longspan.autotune.clock:Cuda"
COMPILER: Final = "longspan.autotune.compiler:Compiler"
MEMORY: Final = 6 << 30  # bytes that one compilation may take
ROOM: Final = 1 << 30  # and that must be free for each compile worker
MOST: Final = 64  # compile workers
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
        return merge(*merged, export, SOURCES)
    return tune(Asked(budget=seconds(budget), export=export, as_json=as_json, **options))


def seconds(text: str) -> float:
    """Read a time: ``90s``, ``5m``, ``1h``, or seconds."""
    units = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
    found = re.fullmatch(r"(\d{1,9}(?:\.\d*)?|\.\d+)([smh]?)", text, re.ASCII)
    if found is None or not (meant := float(found[1]) * units[found[2]]):
        refused("budget", "a time as 90s, 5m or 1h", repr(text))
    return meant


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
    if asked.png is not None:
        drawable(asked.png)
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
        if not entries:
            of = "these kernels" if asked.model is None else f"these kernels, of which {asked.model} launches none"
            msg = f"there is nothing to tune of {of} on {device.arch}"
            raise Refused(msg)
        page = console()
        absent = [family.name for family in chosen if all(entry.family is not family for entry in entries)]
        if absent and not asked.as_json:
            page.print(
                f"{', '.join(absent)}: nothing to tune on {device.arch}" + ("" if cases is None else " for this model")
            )
        tuner = Tuner(entries=entries, journal=journal, device=device, compilers=compilers, measurers=measurers,
                      exhaustive=asked.exhaustive, begun=begun)  # fmt: skip
        with Watch(page, asked.budget, quiet=asked.as_json) as watch:
            watch.begin(tuner)
            tuner.watch = watch
            try:
                tuner.run(asked.budget)
            finally:  # whatever stops it, who has won by then serves
                if not asked.compile_only:
                    keep(asked.export, device, entries, journal, triton_version())
    found = report(tuner, asked.gate, asked.clock, asked.sources)
    if asked.as_json:
        print_json(found)
    else:
        conclude(page, found)
    if asked.png is not None:
        draw(found, asked.png)
    return 0 if found["ok"] else 1


def drawable(png: Path) -> None:
    """Refuse a picture that cannot be drawn before minutes are spent on it."""
    from .preflight import check_png  # noqa: PLC0415 - imports PyTorch

    check_png(png)
    if find_spec("matplotlib") is None:
        refused("--png", "left out where there is no matplotlib", "none; pip install 'longspan[bench]' brings it")


def draw(found: dict[str, Any], png: Path) -> None:
    """Draw the picture, or say why there is none."""
    from .tune_picture import picture  # noqa: PLC0415 - matplotlib is an extra

    try:
        picture(found, png)
    except OSError as error:
        refused("png", "a file that can be written", f"{png}: {error.strerror}")


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
    device = described(found)
    stack.enter_context(alone(found["uuid"], device.slug))
    return device, asking


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


def crew(cores: int, memory: int | None, *, alone: bool) -> int:
    """Count the compile workers that cores and bytes of free memory bear, beside a measuring worker or alone."""
    left = cores - (2 if cores > 4 and not alone else 1 if cores > 2 else 0)
    return max(1, min(left, MOST, left if memory is None else memory // ROOM))


def available() -> int | None:
    """Bytes of memory that could be had without swapping; None where nobody says."""
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return None if found is None else int(found[1]) << 10


def compile_pool(asked: Asked) -> Pool:
    """Start the compile workers: one a core, but for the coordinator's and the measuring worker's."""
    cores = len(os.sched_getaffinity(0))
    count = asked.workers or crew(cores, available(), alone=asked.compile_only)
    # What a worker must not do: interpret, or look for threads that the others need.
    environment = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    pool = Pool(asked.compiler, {"sources": list(asked.sources)}, count=count, memory=MEMORY, environment=environment)
    pool.warm()
    return pool
