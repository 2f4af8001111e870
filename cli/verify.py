"""`longspan verify`: the laws of the contract, tried on random problems on this machine's real device."""

import math
import secrets
import sys
import time
from typing import Any, Final

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from longspan.backends import Backend
from longspan.laws import LAWS, Law

from .machine import describe, find_device, load_backend, said
from .page import console, percent, print_json, refused
from .search import Tally, quiet, search

REPORT: Final = 5.0  # seconds between lines of progress where there is no terminal


def verify(
    backend: str,
    seconds: float,
    device: str | None,
    *,
    seed: int | None,
    only: tuple[str, ...],
    mutant: str | None,
    as_json: bool,
) -> int:
    """Run the laws round-robin; exit code 1 when one fails.

    Args:
        backend: Name of the backend.
        seconds: How long to look.
        device: Where; the GPU if there is one.
        seed: Of all random choices; None draws one.
        only: Names of laws; none means all.
        mutant: Name of a planted bug, examined in place of the backend.
        as_json: Print JSON at the end, and nothing else.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        refused("seconds", "a number above 0", seconds)
    where, laws = find_device(device), find_laws(only)
    subject, source = (load_backend(backend), f'backends.load("{backend}")') if mutant is None else planted(mutant)
    seed = secrets.randbelow(2**32) if seed is None else seed
    page = console()
    if not as_json:
        page.print(said(describe(where)))
        name = f"backend {backend}" if mutant is None else f"planted bug {mutant}"
        page.print(f"{name} · {len(laws)} laws · {seconds:g} s · --seed {seed}")
    tallies = [Tally(law) for law in laws]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the problems are small, and a thread pool only slows them down
    try:
        with quiet():
            run(tallies, subject, where, seed, seconds, None if as_json else page)
    finally:
        torch.set_num_threads(threads)
    broken = next((tally for tally in tallies if tally.broken), None)
    case = None if broken is None else paste(broken, source, where)
    if as_json:
        print_json(report(tallies, case, backend if mutant is None else mutant, seed, where))
    else:
        conclude(page, tallies, broken, case)
    return 0 if broken is None else 1


def run(
    tallies: list[Tally], backend: Backend, device: torch.device, seed: int, seconds: float, page: Console | None
) -> None:
    """Give the laws turns until the time is up or one is broken; show the score meanwhile."""
    started = time.monotonic()
    end, told = started + seconds, started
    live = Live(console=page, auto_refresh=False) if page is not None and page.is_terminal else None
    with live or _Silence():
        while time.monotonic() < end:
            for tally in tallies:
                if time.monotonic() >= end and tally.tried:
                    continue
                search(tally, backend, device, seed, end)
                if tally.broken:
                    return
                if live is not None:
                    live.update(table(tallies), refresh=True)
                elif page is not None and time.monotonic() - told > REPORT:
                    told = time.monotonic()
                    page.print(progress(tallies, told - started))


class _Silence:
    """Stands where a live table would, where there is no terminal."""

    def __enter__(self) -> None:
        """Show nothing."""

    def __exit__(self, *_: object) -> None:
        """Keep exceptions going."""


def find_laws(names: tuple[str, ...]) -> list[Law]:
    """Look laws up by name; all of them where there is none."""
    known = {law.name: law for law in LAWS}
    for name in names:
        if name not in known:
            refused("law", f"one of {', '.join(known)}", repr(name))
    return [known[name] for name in dict.fromkeys(names)] or list(LAWS)


def planted(name: str) -> tuple[Backend, str]:
    """Look a planted bug up by name, and write how a test would."""
    from longspan.laws.mutants import MUTANTS  # noqa: PLC0415 - a user's own backend needs no bugs

    known = {mutant.name: mutant for mutant in MUTANTS}
    if name not in known:
        refused("mutant", f"one of {', '.join(known)}", repr(name))
    return known[name].backend, f'next(mutant.backend for mutant in MUTANTS if mutant.name == "{name}")'


def progress(tallies: list[Tally], seconds: float) -> str:
    """Write the score so far as one line."""
    worst = max(tallies, key=lambda tally: tally.worst)
    tried, declined = (sum(getattr(tally, name) for tally in tallies) for name in ("tried", "declined"))
    return (
        f"{seconds:4.0f} s: {tried} problems tried ({declined} declined), every law holds; "
        f"worst error {percent(worst.worst)} of its budget ({worst.law.name})"
    )


def table(tallies: list[Tally]) -> Table:
    """Lay the score out: a row per law."""
    shown = Table("operation", "law")
    for heading in ("tried", "declined", "worst error / budget"):
        shown.add_column(heading, justify="right")
    for tally in tallies:
        state = "BROKEN" if tally.broken else percent(tally.worst) if tally.tried > tally.declined else "–"
        style = "bold red" if tally.broken else None
        shown.add_row(tally.law.operation, tally.law.name, str(tally.tried), str(tally.declined), state, style=style)
    return shown


def conclude(page: Console, tallies: list[Tally], broken: Tally | None, case: str | None) -> None:
    """Print the final score, and a counterexample where there is one."""
    if not page.is_terminal or broken is not None:
        page.print(table([tally for tally in tallies if tally.tried]))
    reasons = sorted(set().union(*(tally.reasons for tally in tallies)))
    if reasons:
        page.print("Declined (valid problems that this backend says it does not serve):")
        for reason in reasons:
            page.print(f"  {reason}", markup=False)
    if broken is None:
        tried = sum(tally.tried - tally.declined for tally in tallies)
        page.print(f"Every law held on {tried} problems.")
        return
    smaller = "as small as it gets" if broken.shrunk else "as small as it got in time"
    page.print(f"\nA law is broken: {broken.law.name}", style="bold red")
    page.print(f"  the law:  {broken.law.sentence}", markup=False, soft_wrap=True)
    page.print(f"  it fails: {broken.message}", markup=False, soft_wrap=True)
    page.print(f"A counterexample ({smaller}), to paste into a test or an interpreter:\n")
    print(case, file=sys.stdout)  # not through rich, which would fold long lines


def paste(tally: Tally, source: str, device: torch.device) -> str:
    """Write a counterexample as a program that fails."""
    kind = type(tally.counterexample).__name__
    mutants = "from longspan.laws.mutants import MUTANTS\n" if "MUTANTS" in source else ""
    backends = "from longspan import backends\n" if "backends.load" in source else ""
    return (
        f"{backends}from longspan.laws import LAWS, {kind}\n{mutants}\n"
        f"backend = {source}\n"
        f"problem = {tally.counterexample!r}\n"
        f'law = next(law for law in LAWS if law.name == "{tally.law.name}")\n'
        f'law.check(backend, problem, "{device}")\n'
    )


def report(tallies: list[Tally], case: str | None, subject: str, seed: int, device: torch.device) -> dict[str, Any]:
    """Write the score for machines."""
    laws = {
        tally.law.name: {
            "operation": tally.law.operation, "tried": tally.tried, "declined": tally.declined,
            "worst_fraction_of_budget": tally.worst, "broken": tally.broken, "message": tally.message or None,
        }
        for tally in tallies
    }  # fmt: skip
    holds = case is None
    return {
        "machine": describe(device), "subject": subject, "seed": seed, "holds": holds, "laws": laws,
        "counterexample": case,
    }  # fmt: skip
