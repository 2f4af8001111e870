"""The report of `longspan preflight` as tables for people."""

from typing import Any, Final

from rich.console import Console
from rich.table import Table

from .machine import said
from .page import duration, percent, size

BANDS: Final = {
    "high": "high: turned > 32 times in training",
    "mid": "mid: 1 to 32 times",
    "low": "low: never came round",
}


def show(page: Console, report: dict[str, Any]) -> None:
    """Print the report."""
    name = report["source"] or report["model_type"] or report["config"]
    page.print(f"\n{name} at {report['context']} tokens, {report['dtype']}", markup=False, style="bold")
    page.print(said(report["machine"]), markup=False)
    page.print(layer_table(report["layers"]))
    for kinds, layer in alike(report["layers"]):
        rotation_lines(page, " and ".join(kinds), layer, report)
    page.print(f"\nCost at {report['context']} tokens", markup=False)
    page.print(cost_table(report))
    page.print(f"Peak: inputs, results and all between, of one layer, by {report['memory_measured_by']}.", markup=False)
    page.print("Time and memory are of rotation and attention alone: no projections, no MLPs, batch 1.", markup=False)
    model = report["model"]
    saved = model["cache_bytes_windowed"]
    kept = "" if saved == model["cache_bytes"] else f" ({size(saved)} where windowed layers keep their window only)"
    page.print(f"Cache of all layers at {report['context']} tokens: {size(model['cache_bytes'])}{kept}.", markup=False)
    for note in report["notes"]:
        page.print(f"Note: {note}.", markup=False, soft_wrap=True)
    page.print(
        f"\n{report['verdict']}", markup=False, soft_wrap=True, style="bold green" if report["ok"] else "bold red"
    )


def layer_table(layers: dict[str, Any]) -> Table:
    """Lay out what the layers are, who serves them, and how exactly."""
    table = Table("layers", "heads", "dims", "sees", "served by", "error / budget")
    for kind, layer in layers.items():
        dims = f"{layer['head_dim']}" + (
            "" if layer["value_dim"] == layer["head_dim"] else f", values {layer['value_dim']}"
        )
        dims += "" if layer["rotary_dim"] in {0, layer["head_dim"]} else f", {layer['rotary_dim']} turn"
        table.add_row(
            f"{layer['count']} × {kind}", f"{layer['heads']} on {layer['key_heads']}", dims, sight(layer),
            served(layer), judged(layer["accuracy"]),
        )  # fmt: skip
    return table


def sight(layer: dict[str, Any]) -> str:
    """Say which keys a query of the layer sees."""
    parts = ["causal" if layer["causal"] else "both ways"]
    parts += [f"window {layer['window']}"] if layer["window"] else []
    parts += [f"chunks of {layer['chunk']}"] if layer["chunk"] else []
    parts += ["sinks"] if layer["sinks"] else []
    parts += [f"softcap {layer['softcap']:g}"] if layer["softcap"] else []
    return ", ".join(parts)


def served(layer: dict[str, Any]) -> str:
    """Name the backends that serve a layer, and say why a faster one does not."""
    backend = layer["backend"]
    if backend["declined"] is not None:
        return f"nobody: {backend['declined']}"
    names = backend["serves"]
    text = names["attention"]
    if names.get("rotate_qk", text) != text:
        text += f", rotation by {names['rotate_qk']}"
    reasons = {name: why for passed in backend["passed_over"].values() for name, why in passed.items()}
    return text + "".join(f"\n(not {name}: {why})" for name, why in reasons.items())


def judged(checked: dict[str, Any] | None) -> str:
    """Say how far from the truth the sampled rows were."""
    if checked is None:
        return "not measured"
    if not checked["inside"]:
        return "OUTSIDE"
    rows = f"{len(checked['rows'])} rows, {checked['key_heads']} key heads"
    return f"{percent(checked['worst_fraction_of_budget'])}, inside ({rows})"


def alike(layers: dict[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Gather the kinds of layers that rotate alike."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for kind, layer in layers.items():
        for kinds, other in found:
            if all(other[key] == layer[key] for key in ("rotation", "trained_context")):
                kinds.append(kind)
                break
        else:
            found.append(([kind], layer))
    return found


def rotation_lines(page: Console, kind: str, layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Print what the rotation does to each band."""
    rotation = layer["rotation"]
    if rotation is None:
        page.print(f"\nRotation of {kind}: none", markup=False)
        return
    factors = f"attention factor {rotation['attention_factor']:.4g}, softmax factor {rotation['softmax_factor']:.4g}"
    target = "" if report["target_context"] is None else f", made for {report['target_context']}"
    page.print(
        f"\nRotation of {kind}: {rotation['type']}, base {rotation['base']:g}, {factors}; "
        f"trained at {layer['trained_context']}{target}",
        markup=False,
    )
    table = Table("band", "planes", "wavelength in training, tokens", "speed now")
    for name, band in rotation["bands"].items():
        waves = "–" if band["wavelength"] is None else " to ".join(f"{wave:,.0f}" for wave in band["wavelength"])
        table.add_row(BANDS[name], str(band["planes"]), waves, band["effect"])
    page.print(table)


def cost_table(report: dict[str, Any]) -> Table:
    """Lay out time and memory of one layer of each kind and of the model."""
    table = Table("")
    for heading in ("prefill", "peak", "decode, a token", "peak"):
        table.add_column(heading, justify="right")
    for kind, layer in report["layers"].items():
        cells = [cell for phase in ("prefill", "decode") for cell in costs(layer[phase])]
        table.add_row(f"one layer, {kind}", *cells)
    model = report["model"]
    times = [duration(model[f"{phase}_seconds"]) for phase in ("prefill", "decode")]
    marks = ["≈ " if phase in model["extrapolated"] else "" for phase in ("prefill", "decode")]
    count = sum(layer["count"] for layer in report["layers"].values())
    table.add_row(
        f"all {count} layers", marks[0] + times[0], marks[0] + size(model["layer_peak_bytes"]), marks[1] + times[1], ""
    )
    return table


def costs(curve: dict[str, Any] | None) -> tuple[str, str]:
    """Write time and memory of one phase; what was extrapolated is marked."""
    if curve is None:
        return "–", "–"
    mark = "≈ " if curve["extrapolated"] else ""
    return mark + duration(curve["seconds"]), mark + size(curve["peak_bytes"])
