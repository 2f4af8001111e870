"""Draw the results files, and write their tables into docs/benchmarks.md and what they come to into README.md.

python benchmarks/plots.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import KERNELS, brief, names, picture, render, replaced, thousands
from record import RESULTS, load

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "benchmarks.md"
README: Final = ROOT / "README.md"
IMAGES: Final = ROOT / "docs" / "images"
COLUMNS: Final = 3

Cells = Sequence[dict[str, Any]]
Line = dict[float, float]


def recorded(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every results file, by name."""
    return [load(path) for path in sorted(folder.glob("*.json"))]


def panels(section: str, cells: Cells) -> dict[str, dict[str, Line]]:
    """What is drawn: panel → contestant → length → figure."""
    found: dict[str, dict[str, Line]] = {}
    for cell in cells:
        of = cell["cell"]
        title = {
            "rotate": "backward" if of["backward"] else "forward",
            "decode": f"batch {of['b']}",
            "growth": "causal",
            "memory": "forward and backward, causal",
        }.get(section, f"d{of['d']}, {of['h']}/{of['g']} heads, {of['mask']}")
        if section == "features":
            title += (", softcap" if of["softcap"] else "") + (", sinks" if of["sinks"] else "")
        for x in cell["readings"]:
            line = found.setdefault(title, {}).setdefault(x["kernel"], {})
            line[of["n"]] = drawn(section, of, x)
    return found


def drawn(section: str, of: dict[str, Any], x: dict[str, Any]) -> float:
    """The number of a reading that a picture shows."""
    if section == "growth":
        return x["median_us"] / of["n"] ** 2 * 1e6
    return x["extra_bytes"] / 2**20 if section == "memory" else x["figure"]


def axis(section: str) -> str:
    """Name of the vertical axis."""
    return {
        "decode": "TB/s of keys and values", "rotate": "TB/s", "growth": "time / tokens², ps",
        "memory": "MiB beyond inputs and results",
    }.get(section, "TFLOP/s")  # fmt: skip


def draw(device: str, section: str, cells: Cells, folder: Path) -> Path | None:
    """Draw one table into a file; None where it holds no figure, or one length alone."""
    found = panels(section, cells)
    if not found or section == "host":
        return None
    path = folder / picture(device, section)
    folder.mkdir(parents=True, exist_ok=True)
    sketch(device, section, found, names(cells)).savefig(path, dpi=110, metadata={"Software": None})
    return path


def sketch(device: str, section: str, found: dict[str, dict[str, Line]], order: Sequence[str]) -> Figure:
    """Draw the panels of one table, all on one scale."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(1.2 + 3.2 * columns, 0.8 + 2.8 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(found))]
    colours = {name: f"C{i}" for i, name in enumerate(order)}
    most = max(figure for lines in found.values() for line in lines.values() for figure in line.values()) or 1.0
    for ax, (title, lines) in zip(axes, found.items(), strict=True):
        panel(ax, title, lines, colours)
        if section == "memory":
            ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(0, 1.08 * most)
    for ax in axes[::columns]:
        ax.set_ylabel(axis(section))
    handles = {str(line.get_label()): line for ax in axes for line in ax.get_lines()}
    shown = [name for name in order if name in handles]
    figure.legend(
        [handles[name] for name in shown], shown, loc="outside lower center", ncols=min(5, len(shown)), frameon=False,
        fontsize=8,
    )  # fmt: skip
    figure.suptitle(device, fontsize=10)
    return figure


def panel(ax: Axes, title: str, lines: dict[str, Line], colours: dict[str, str]) -> None:
    """Draw one panel: figures against tokens."""
    lengths = sorted({length for line in lines.values() for length in line})
    for name, line in sorted(lines.items()):
        points = sorted(line.items())
        ax.plot(
            *zip(*points, strict=True), label=name, color=colours[name], marker="o", markersize=4,
            linewidth=2.2 if name in KERNELS else 1.1,
        )  # fmt: skip
    ax.set_title(title, fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [thousands(int(length)) for length in lengths], fontsize=8)
    ax.set_xlim(lengths[0] / 1.4, lengths[-1] * 1.4)
    ax.minorticks_off()
    ax.set_xlabel("tokens", fontsize=8)
    ax.grid(alpha=0.3)


def made(found: Sequence[dict[str, Any]]) -> dict[Path, str]:
    """What each page holds between its markers."""
    images = {path.name for path in IMAGES.glob("*.png")}
    return {PAGE: render(found, images), README: brief(found, images)}


def main() -> int:
    """Draw everything, then write the page that shows it."""
    found = recorded()
    for results in found:
        for section, run in results["sections"].items():
            path = draw(results["device"], section, run["cells"], IMAGES)
            print(f"{path or 'nothing'} drawn for {results['device']}, {section}")
    for page, text in made(found).items():
        page.write_text(replaced(page.read_text("utf-8"), text), "utf-8")
        print(f"{page} holds what was recorded on {len(found)} devices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
