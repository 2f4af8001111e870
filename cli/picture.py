"""The picture of `longspan preflight`: wavelengths against contexts, and time against length."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def picture(report: dict[str, Any], png: Path) -> None:
    """Draw both panels and write the file."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    wavelengths(left, report)
    times(right, report)
    name = report["source"] or report["model_type"] or report["config"]
    machine = report["machine"]
    figure.suptitle(
        f"{name} at {report['context']:,} tokens · {machine['device_name']} · {report['dtype']}", fontsize=11
    )
    figure.savefig(png, dpi=130)


def wavelengths(axes: Axes, report: dict[str, Any]) -> None:
    """Draw the wavelength of every plane, as trained and as it is now, against the contexts."""
    drawn: set[str] = set()
    for kind, layer in report["layers"].items():
        rotation = layer["rotation"]
        if rotation is None or str(rotation["wavelengths"]) in drawn:
            continue
        drawn.add(str(rotation["wavelengths"]))
        waves = rotation["wavelengths"]
        alike = [name for name, other in report["layers"].items() if other["rotation"] == rotation]
        suffix = "" if len(alike) == len(report["layers"]) else f" ({kind})"
        axes.plot(waves["trained"], ".", color="0.6", label=f"as trained{suffix}")
        axes.plot([wave or float("nan") for wave in waves["now"]], ".", label=f"{rotation['type']}{suffix}")
        axes.axhline(layer["trained_context"], color="tab:green", linestyle=":", linewidth=1)
        axes.annotate(
            f"trained context {layer['trained_context']:,}", (0, layer["trained_context"]), va="bottom", fontsize=8
        )
    target = report["target_context"]
    if target is not None and target != report["context"]:
        axes.axhline(target, color="tab:purple", linestyle="-.", linewidth=1)
        axes.annotate(f"target context {target:,}", (0, target), va="bottom", fontsize=8, color="tab:purple")
    axes.axhline(report["context"], color="tab:red", linestyle="--", linewidth=1)
    right = max(axes.get_xlim()[1], 1)
    axes.annotate(
        f"this context {report['context']:,}",
        (right, report["context"]),
        va="top",
        ha="right",
        fontsize=8,
        color="tab:red",
    )
    axes.set(
        yscale="log", xlabel="plane", ylabel="wavelength, tokens", title="How many tokens a plane takes to come round"
    )
    if drawn:
        axes.legend(fontsize=8, loc="upper left")


def times(axes: Axes, report: dict[str, Any]) -> None:
    """Draw the prefill time of one layer of each kind against the length, beside the n² line."""
    ticks = {report["context"]}
    for kind, layer in report["layers"].items():
        curve = layer["prefill"]
        if curve is None or not curve["points"]:
            continue
        lengths = [point["length"] for point in curve["points"]]
        seconds = [point["seconds"] for point in curve["points"]]
        (line,) = axes.plot(lengths, seconds, "o-", markersize=4, label=f"{kind}, measured")
        if curve["extrapolated"]:
            ends = [lengths[-1], report["context"]], [seconds[-1], curve["seconds"]]
            axes.plot(*ends, "--", color=line.get_color(), label=f"{kind}, extrapolated by {curve['growth']}")
        ends = [lengths[0], report["context"]]
        square = [seconds[-1] * (length / lengths[-1]) ** 2 for length in ends]
        axes.plot(ends, square, ":", color=line.get_color(), alpha=0.7, label=f"n² through the last point of {kind}")
        ticks.update(lengths)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="seconds",
        title="Prefill of one layer: rotation and attention",
    )
    shown = sorted(ticks)[:: max(1, len(ticks) // 6)]
    axes.set_xticks(shown, [f"{length:,}" for length in shown])
    axes.minorticks_off()
    axes.grid(visible=True, which="major", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
