"""Adding layers up to a model, and saying in one line what that means."""

from typing import Any

from .page import duration, percent, size


def conclude(facts: dict[str, Any]) -> dict[str, Any]:
    """Add up the model, and judge it: ``model``, ``notes``, ``ok`` and ``verdict``."""
    model = total(facts["layers"])
    ok = all(good(layer) for layer in facts["layers"].values())
    return {"model": model, "notes": notes(facts), "ok": ok, "verdict": verdict(facts, model)}


def good(layer: dict[str, Any]) -> bool:
    """Whether a layer is served, and was found inside the budget."""
    return layer["accuracy"] is not None and layer["accuracy"]["inside"]


def total(layers: dict[str, Any]) -> dict[str, Any]:
    """Scale one layer of each kind to all layers; attention and rotation only, no projections and no MLPs."""
    cache = {key: sum(layer[key] for layer in layers.values()) for key in ("cache_bytes", "cache_bytes_windowed")}
    times: dict[str, float | None] = {}
    for phase in ("prefill", "decode"):
        each = [None if layer[phase] is None else layer[phase]["seconds"] for layer in layers.values()]
        counts = [layer["count"] for layer in layers.values()]
        times[f"{phase}_seconds"] = (
            None if None in each else sum(count * seconds for count, seconds in zip(counts, each, strict=True))
        )
    peaks = [layer["prefill"]["peak_bytes"] for layer in layers.values() if layer["prefill"] is not None]
    return {
        **cache,
        **times,
        # Layers run one after the other: the largest is what they need beside the cache.
        "layer_peak_bytes": max(peaks) if peaks and None not in peaks else None,
        "extrapolated": [phase for phase in ("prefill", "decode") if any(guessed(x[phase]) for x in layers.values())],
    }


def guessed(curve: dict[str, Any] | None) -> bool:
    """Whether a curve was extrapolated."""
    return curve is not None and curve["extrapolated"]


def notes(facts: dict[str, Any]) -> list[str]:
    """Say what a reader should know before trusting the numbers."""
    said, context = [], facts["context"]
    target = facts["target_context"]
    if target is not None and context > target:
        said.append(f"{context} tokens are more than the {target} that this configuration is made for")
    for kind, layer in facts["layers"].items():
        rotation = layer["rotation"]
        if rotation is not None and rotation["unseen_planes"]:
            said.append(
                f"{kind}: {rotation['unseen_planes']} low planes turn up to {rotation['unseen_reach']:.3g} times "
                f"further than in the {layer['trained_context']} trained, safe only after training at length"
            )
        if layer["omits"]:
            said.append(f"{kind}: the config's {', '.join(layer['omits'])} is not part of what was measured")
        for phase in ("prefill", "decode"):
            curve = layer[phase]
            if guessed(curve):
                said.append(
                    f"{kind}: {phase} was measured up to {curve['measured_at']} tokens and is extrapolated from there "
                    f"by {curve['growth']}, because {curve['stopped']}"
                )
            elif curve is not None and not curve["points"]:
                said.append(f"{kind}: {phase} was not measured, because {curve['stopped']}")
        checked = layer["accuracy"]
        if checked is not None and checked["length"] < context:
            said.append(f"{kind}: the error is that at {checked['length']} tokens, the longest that fits")
        if checked is not None and not checked["of_prefill"] and checked["length"] == context:
            said.append(
                f"{kind}: the sampled queries attended one at a time to all {context} keys, not within a prefill"
            )
    return said


def verdict(facts: dict[str, Any], model: dict[str, Any]) -> str:
    """Say in one line whether this works, and what it takes."""
    layers, context = facts["layers"], facts["context"]
    for kind, layer in layers.items():
        if layer["backend"]["declined"] is not None:
            return f"NOT SERVED: {kind} at {context} tokens: {layer['backend']['declined']}"
        if layer["accuracy"] is None:
            return f"NOT MEASURED: {kind} does not fit into this device's memory at any length"
        if not layer["accuracy"]["inside"]:
            return f"OUTSIDE THE BUDGET: {kind} at {context} tokens: {layer['accuracy']['problem']}"
    worst = max(layer["accuracy"]["worst_fraction_of_budget"] for layer in layers.values())
    about = {phase: "about " if phase in model["extrapolated"] else "" for phase in ("prefill", "decode")}
    times = {phase: about[phase] + duration(model[f"{phase}_seconds"]) for phase in about}
    beyond = facts["target_context"] is not None and context > facts["target_context"]
    return (
        f"{'BEYOND ITS CONTEXT, INSIDE' if beyond else 'INSIDE'} THE BUDGET at {context} tokens: error at most "
        f"{percent(worst)} of it; rotation and attention of all layers take {times['prefill']} "
        f"for prefill and {times['decode']} a decoded token; cache {size(model['cache_bytes'])}"
    )
