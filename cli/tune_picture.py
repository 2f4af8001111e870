"""The picture of `longspan tune`: how much faster each key's winner is than the heuristic."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from longspan.autotune.family import phrase


def picture(found: dict[str, Any], png: Path) -> None:
    """Draw a bar per key and write the file."""
    keys = [key for key in found["keys"] if key["gain"] is not None]
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{key['kernel']}: {phrase(key['key'])}" for key in keys]
    gains = [100 * (key["gain"] - 1) for key in keys]
    noise = [200 * (key["noise"] or 0.0) for key in keys]
    axes.barh(names, gains, xerr=noise, color="tab:blue", ecolor="0.4")
    axes.axvline(0, color="0.4", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set(
        xlabel="% faster than the heuristic",
        title=f"{found['device_name'] or found['device']}, triton {found['triton']}",
    )
    figure.savefig(png, dpi=130)
