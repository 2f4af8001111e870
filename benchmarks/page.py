"""Results as Markdown: every table of the page, made from the results files and from nothing else."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final

from peers import CEILINGS, CONTESTANTS

from longspan.backends import NAMES

BEGIN: Final = "<!-- made by benchmarks/plots.py from benchmarks/results: begin -->"
END: Final = "<!-- made by benchmarks/plots.py from benchmarks/results: end -->"
EMPTY: Final = "No results are recorded yet: `make bench` records those of your GPU."
TITLES: Final = {
    "forward": "Attention, forward: TFLOP/s",
    "backward": "Attention, backward: TFLOP/s",
    "features": "Masks and scores of real models, forward: TFLOP/s of visible work",
    "host": "The host's part of one call, gradients off: µs",
    "decode": "Decode: TB/s of keys and values read",
    "rotate": "Rotary embedding of queries and keys: TB/s read and written",
    "quantised": "Heads in e4m3 beside heads in bf16, forward: TFLOP/s",
    "growth": "Growth: time over tokens²",
    "memory": "Memory of forward and backward beyond inputs and results",
}


# What README rates, and in which words; flash-attn-4 is a peer.
RATED: Final = {
    "forward": "attention, forward", "backward": "attention, backward", "features": "real models' masks and scores",
    "decode": "decode", "rotate": "rotary embedding",
}  # fmt: skip
FASTEST: Final = "the fastest of them"
SPREAD: Final = 0.1  # of the median: what marks a figure as loose
SHOWN: Final = ("forward", "backward", "decode", "rotate", "memory")  # as pictures, in README
OWN: Final = tuple(contestant.name for contestant in CONTESTANTS if contestant.own)
KERNELS: Final = tuple(name for name in OWN if name != "sdpa")  # which only leads to PyTorch's


def replaced(page: str, made: str) -> str:
    """Put what was made between the markers of a page.

    Raises:
        ValueError: When a marker is missing.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        message = f"the page must hold the markers {BEGIN} and {END}, in this order"
        raise ValueError(message)
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"


def render(results: Sequence[dict[str, Any]], images: Iterable[str]) -> str:
    """Write the tables of every device.

    Args:
        results: Results files, as read.
        images: Names of the pictures that exist, ``<device>-<table>.png``.
    """
    images = set(images)
    return "\n\n".join(device(found, images) for found in results) if results else EMPTY


def device(found: dict[str, Any], images: set[str]) -> str:
    """Write the tables of one device."""
    parts = [f"## {found['device']}"]
    for section, run in found["sections"].items():
        parts.append(f"### {TITLES[section]}")
        parts.append(origin(run))
        cells = run["cells"]
        parts.append({"memory": memory, "growth": growth}.get(section, partial(grid, section))(cells))
        parts += absentees(cells)
        image = picture(found["device"], section)
        if image in images:
            parts.append(f"![{TITLES[section]}, {found['device']}](images/{image})")
    return "\n\n".join(parts)


def brief(results: Sequence[dict[str, Any]], images: Iterable[str]) -> str:
    """Write README's part: every backend against its peers, table by table, and the pictures.

    Args:
        results: Results files, as read.
        images: Names of the pictures that exist.
    """
    images = set(images)
    return "\n\n".join(part for found in results for part in against(found, images)) if results else EMPTY


def against(found: dict[str, Any], images: set[str]) -> list[str]:
    """Write README's part on one device: a row a table and backend, a column a peer."""
    rated = {RATED[section]: ratios(run["cells"]) for section, run in found["sections"].items() if section in RATED}
    seen = {peer for of in rated.values() for by_peer in of.values() for peer in by_peer} - {FASTEST}
    peers = [*(contestant.name for contestant in CONTESTANTS if contestant.name in seen), FASTEST]
    rows = [
        [title, backend, *(by_peer.get(peer, "–") for peer in peers)]
        for title, of in rated.items()
        for backend, by_peer in of.items()
    ]
    dates = sorted({run["date"] for run in found["sections"].values()})
    head = (
        f"{found['device']}, {dates[0][:10]}: speed as a multiple of the peer's, in one run with it (above 1: faster). "
        "The geometric mean over the problems that both ran (worst … best)."
    )
    pictures = [
        f"![{TITLES[section]}, {found['device']}](docs/images/{picture(found['device'], section)})"
        for section in SHOWN
        if section in found["sections"] and picture(found["device"], section) in images
    ]
    return [head, table(["table", "backend", *peers], rows), *pictures]


def ratios(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Rate backends by each peer, over the problems that both ran, and by the fastest peer of each problem.

    Returns:
        Backend → peer, or `FASTEST` → geometric mean, worst and best. Twins, as that of pages, are not rated.
    """
    times = [{x["kernel"]: x["median_us"] for x in cell["readings"]} for cell in cells]
    ordered = [name for name in names(cells) if name not in CEILINGS]
    peers = [name for name in ordered if name not in OWN]
    for time in times:
        if ran := [time[peer] for peer in peers if peer in time]:
            time[FASTEST] = min(ran)
    rated: dict[str, dict[str, str]] = {}
    for own in (name for name in ordered if name in KERNELS and name in NAMES):
        for peer in (*peers, FASTEST):
            found = [time[peer] / time[own] for time in times if {own, peer} <= set(time)]
            if found:
                mean = math.exp(sum(map(math.log, found)) / len(found))
                rated.setdefault(own, {})[peer] = f"{mean:.2f} ({min(found):.2f} … {max(found):.2f})"
    return rated


def picture(name: str, section: str) -> str:
    """File of a table's picture."""
    return f"{'-'.join(name.lower().split())}-{section}.png"


def origin(run: dict[str, Any]) -> str:
    """Say when, and with what."""
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value != "absent")
    rounds = {x["rounds"] for cell in run["cells"] for x in cell["readings"] if "rounds" in x}
    of = f" of {max(rounds)} rounds" if rounds else ""
    return f"One run{of}, {run['date']}; {versions}."


def grid(section: str, cells: Sequence[dict[str, Any]]) -> str:
    """A row a problem, a column a contestant; the best of each row in bold, ceilings apart."""
    kernels = names(cells)
    rows = []
    for cell in cells:
        readings = {x["kernel"]: x for x in cell["readings"]}
        best = min((x["median_us"] for name, x in readings.items() if name not in CEILINGS), default=None)
        rows.append([label(section, cell["cell"]), *(figure(readings.get(name), best) for name in kernels)])
    return table(["problem", *kernels], rows)


def figure(reading: dict[str, Any] | None, best: float | None) -> str:
    """One figure, loose ones marked, and beside it the time of an eager launch where a graph was timed."""
    if reading is None:
        return "–"
    text = ("≈ " if reading["spread"] > SPREAD else "") + short(reading["figure"])
    if reading["median_us"] == best:
        text = f"**{text}**"
    if reading["eager_us"] is not None:
        text += f" ({short(reading['median_us'])} µs; eager {short(reading['eager_us'])} µs)"
    return text


def growth(cells: Sequence[dict[str, Any]]) -> str:
    """Time over tokens squared, by that of the shortest length."""
    first: dict[str, float] = {}
    rows = []
    for cell in cells:
        tokens = cell["cell"]["n"]
        for x in cell["readings"]:
            rate = x["median_us"] / tokens**2
            first.setdefault(x["kernel"], rate)
            ratio = f"{rate / first[x['kernel']]:.3f}"
            time = f"{short(x['median_us'] / 1000)} ms"
            rows.append([x["kernel"], label("growth", cell["cell"]), time, f"{short(x['figure'])} {x['unit']}", ratio])
    return table(["contestant", "problem, causal", "time", "rate", "time over tokens², by the first"], rows)


def memory(cells: Sequence[dict[str, Any]]) -> str:
    """Bytes beyond inputs and results, per token and head."""
    kernels = names(cells)
    rows = []
    for cell in cells:
        of, found = cell["cell"], {x["kernel"]: x["extra_bytes"] for x in cell["readings"]}
        share = of["b"] * of["h"] * of["m"]
        rows.append(
            [label("memory", of)]
            + [
                "–" if name not in found else f"{short(found[name] / 2**20)} MiB ({short(found[name] / share)})"
                for name in kernels
            ]
        )
    return table(["problem", *(f"{name} (bytes a query)" for name in kernels)], rows)


def absentees(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Who did not race, why, and in how many of the cells."""
    found: dict[tuple[str, str, str], int] = {}
    for cell in cells:
        for outcome in ("failed", "skipped"):
            for name, reason in cell[outcome].items():
                found[name, outcome, reason] = found.get((name, outcome, reason), 0) + 1
    if not found:
        return []
    lines = [
        f"- {name} {outcome} in {count} of {len(cells)}: {reason}" for (name, outcome, reason), count in found.items()
    ]
    return ["\n".join(lines)]


def names(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Contestants with a figure, longspan's first and ceilings last."""
    found = {x["kernel"] for cell in cells for x in cell["readings"]}
    return sorted(
        found,
        key=lambda name: (name in CEILINGS, OWN.index(name) if name in OWN else len(OWN), name.lower()),
    )


def label(section: str, of: dict[str, Any]) -> str:
    """A problem in a few words."""
    heads = str(of["h"]) if of["h"] == of["g"] else f"{of['h']}/{of['g']}"
    size = f"batch {of['b']}, {thousands(of['n'])} tokens, {heads} heads, d{of['d']}"
    if of["rotary"]:
        return size + (", backward" if of["backward"] else "") + (", rotary" if section == "host" else "")
    if section in {"decode", "growth", "memory"}:
        return size
    extras = (f", softcap {of['softcap']:g}" if of["softcap"] else "") + (", sinks" if of["sinks"] else "")
    if section == "host":
        extras += f", {of['m']} queries"
    return f"{size}, window {of['window']}{extras}" if of["window"] else f"{size}, {of['mask']}{extras}"


def thousands(tokens: int) -> str:
    """Tokens in units of 1024, or of its square."""
    if tokens % 1024:
        return str(tokens)
    return f"{tokens // 2**20}M" if tokens % 2**20 == 0 else f"{tokens // 1024}k"


def short(x: float) -> str:
    """Three significant digits."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
