"""What `longspan tune` shows while it runs, and what it says at the end."""

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from longspan.autotune.device import triton_version
from longspan.autotune.family import phrase
from longspan.autotune.measurer import reproducer
from longspan.autotune.plan import Entry
from longspan.autotune.resources import spills
from longspan.autotune.tuner import Tuner

from .page import duration

REPORT: Final = 5.0  # seconds between lines of progress where there is no terminal
EACH: Final = 0.25  # and between two pictures where there is one


class Watch:
    """Shows a run while it goes on: a table on a terminal, a line now and then elsewhere."""

    def __init__(self, page: Console, budget: float, *, quiet: bool) -> None:
        self.page, self.budget, self.quiet = page, budget, quiet
        self.live = Live(console=page, auto_refresh=False) if page.is_terminal and not quiet else None
        self.shown = 0.0

    def __enter__(self) -> Self:
        """Open the display."""
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        if self.live is not None:
            self.live.stop()

    def begin(self, tuner: Tuner) -> None:
        """Say what will be done."""
        if self.quiet:
            return
        choices = sum(len(entry.candidates) for entry in tuner.open)
        done = len(tuner.entries) - len(tuner.open)
        self.page.print(
            f"{tuner.device.name or tuner.device.arch} ({tuner.device.slug}) · triton {triton_version()} · "
            f"{len(tuner.open)} keys to tune, {choices} choices"
            + (f"; {done} were tuned before (--fresh measures them again)" if done else "")
            + f" · {duration(self.budget)}"
        )

    def __call__(self, tuner: Tuner) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self.quiet or now - self.shown < (EACH if self.live is not None else REPORT):
            return
        self.shown = now
        if self.live is None:
            self.page.print(line(tuner, self.budget))
        else:
            self.live.update(picture(tuner, self.budget), refresh=True)


def line(tuner: Tuner, budget: float) -> str:
    """Write how far a run is in one line."""
    spent = time.monotonic() - tuner.begun
    raced = sum(len(entry.raced) for entry in tuner.entries)
    answered = sum(bool(entry.raced) or entry.finished for entry in tuner.entries)
    finished = sum(entry.finished for entry in tuner.entries)
    gains = [ratio for entry in tuner.entries if (ratio := so_far(entry)) is not None]
    best = f"; best so far {mean(gains):.2f} × the heuristic" if gains else ""
    return (
        f"{spent:4.0f} s of {budget:.0f}, {tuner.stage}: {tuner.compiled} compiled, {raced} raced, "
        f"{answered} of {len(tuner.entries)} keys answered, {finished} done{best}; {len(tuner.faults)} faults"
    )


def picture(tuner: Tuner, budget: float) -> Table:
    """Lay out how far a run is, key by key."""
    table = Table(title=line(tuner, budget), title_justify="left")
    for heading, justify in (
        ("kernel", "left"),
        ("key", "left"),
        ("tried", "right"),
        ("best", "right"),
        ("gain", "right"),
    ):
        table.add_column(heading, justify="right" if justify == "right" else "left")
    for entry in tuner.entries:
        out = sum(one.state == "out" for one in entry.candidates.values())
        gain = so_far(entry)
        table.add_row(
            entry.family.name, phrase(entry.case.key), f"{len(entry.raced) + out}/{len(entry.candidates)}",
            duration(entry.best), "–" if gain is None else f"{gain:.2f} ×", style="bold" if entry.finished else None,
        )  # fmt: skip
    return table


def so_far(entry: Entry) -> float | None:
    """How much faster the best is than the heuristic, by what is known."""
    if entry.won is not None and entry.won["evidence"]["heuristic_us"]:
        return entry.won["evidence"]["heuristic_us"] / entry.won["evidence"]["us"]
    start = entry.candidates[entry.heuristic].times
    return None if not start or entry.best is None else min(start) / entry.best


def mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def report(tuner: Tuner, gate: str, clock: str, sources: Sequence[str]) -> dict[str, Any]:
    """Write a run down for machines."""
    keys = [result(entry) for entry in tuner.entries]
    faults = []
    for fault in tuner.faults:
        name, case, choice = fault.entry.family.name, fault.entry.case, fault.candidate.choice
        program = reproducer(list(sources), gate, clock, name, case, choice, fault.entry.relatives)
        faults.append({
            "kernel": name, "key": dict(case.key), "choice": dict(choice), "status": fault.status,
            "message": fault.message, "reproduce": program,
        })  # fmt: skip
    gains = [key["gain"] for key in keys if key["gain"] is not None]
    measured = tuner.measurers is not None
    wrong = any(fault["status"] == "wrong" for fault in faults)
    return {
        "device": tuner.device.slug, "device_name": tuner.device.name, "triton": triton_version(),
        "seconds": time.monotonic() - tuner.begun, "answered_seconds": tuner.answered, "compiled": tuner.compiled,
        "mean_gain": mean(gains) if gains else None, "keys": keys, "faults": faults, "measured": measured,
        "left": sum(key["space"] - key["out"] - (key["raced"] if measured else key["ready"]) for key in keys),
        "ok": not wrong and all(key["finished"] if measured else key["ready"] for key in keys),
    }  # fmt: skip


def result(entry: Entry) -> dict[str, Any]:
    """Write one key down."""
    states = [one.state for one in entry.candidates.values()]
    won = entry.won or {"choice": None, "evidence": {}}
    evidence = won["evidence"]
    return {
        "kernel": entry.family.name, "key": dict(entry.case.key), "finished": entry.won is not None,
        "given_up": entry.given_up or None, "choice": won["choice"], "gain": so_far(entry) if entry.won else None,
        "us": evidence.get("us"), "heuristic_us": evidence.get("heuristic_us"), "noise": evidence.get("noise"),
        "raced": len(entry.raced), "out": states.count("out"), "space": len(states), "regret": evidence.get("regret"),
        "ready": len(states) - states.count("out") - states.count("new") - states.count("compiling"),
        "spilling": sum(bool(spills(one.resources)) for one in entry.candidates.values()),
    }  # fmt: skip


def conclude(page: Console, found: dict[str, Any]) -> None:
    """Say what came of a run."""
    if found["measured"]:
        conclude_measured(page, found)
    else:
        conclude_compiled(page, found)
    for fault in found["faults"]:
        loud = "WRONG: " if fault["status"] == "wrong" else ""
        page.print(
            f"{loud}{fault['kernel']}, {phrase(fault['choice'])}: {fault['status']}: {fault['message']}",
            style="bold red" if loud else None, markup=False, soft_wrap=True,
        )  # fmt: skip
        if loud:
            print(fault["reproduce"], file=sys.stdout)  # not through rich, which would fold long lines
    if found["left"] or (found["measured"] and any(not key["finished"] for key in found["keys"])):
        page.print("`longspan tune` again goes on where this run stopped.")


def conclude_compiled(page: Console, found: dict[str, Any]) -> None:
    """Say what compiled."""
    table = Table("kernel", "key")
    for heading in ("choices", "compiled", "spilling", "out", "left"):
        table.add_column(heading, justify="right")
    for key in found["keys"]:
        counts = key["space"], key["ready"], key["spilling"], key["out"], key["space"] - key["ready"] - key["out"]
        table.add_row(key["kernel"], phrase(key["key"]), *map(str, counts))
    page.print(table)
    page.print(f"{found['compiled']} compilations for {found['device']} in {duration(found['seconds'])}.")


def conclude_measured(page: Console, found: dict[str, Any]) -> None:
    """Say who won, by how much, and what the answer is worth."""
    table = Table("kernel", "key")
    for heading in ("heuristic", "tuned", "gain", "noise", "not raced"):
        table.add_column(heading, justify="right")
    table.add_column("choice")
    for key in found["keys"]:
        left = key["space"] - key["raced"] - key["out"]
        micro = (None if key[name] is None else key[name] * 1e-6 for name in ("heuristic_us", "us"))
        table.add_row(
            key["kernel"], phrase(key["key"]), *map(duration, micro),
            "–" if key["gain"] is None else f"{key['gain']:.3f} ×",
            "–" if key["noise"] is None else f"{100 * key['noise']:.1f} %", str(left),
            key["given_up"] or ("not finished" if key["choice"] is None else phrase(key["choice"])),
        )  # fmt: skip
    page.print(table)
    regrets = [key["regret"] for key in found["keys"] if key["regret"] is not None]
    if regrets:
        page.print(f"Of all choices swept, the race alone crowned one within {100 * max(regrets):.1f} % of the best.")
    if found["mean_gain"] is not None:
        page.print(f"Tuned launches are {found['mean_gain']:.3f} × as fast as the heuristic's (geometric mean).")
    answered = sum(key["finished"] or key["raced"] > 0 for key in found["keys"])
    said = f"{answered} of {len(found['keys'])} keys have a verified answer"
    if found["answered_seconds"] is not None:
        said = f"every key had a verified answer after {duration(found['answered_seconds'])}"
    page.print(
        f"{duration(found['seconds'])}; {said}. "
        "What a winner may lack: the noise of its final, and whatever the choices not raced would have gained."
    )
