"""`longspan preflight`: what a published model takes at a context length, on this machine."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.backends import Backend, Unsupported, auto

from .accuracy import check
from .bands import describe_rotation
from .config import Plan, plans, read, target_context, trained_context
from .machine import describe, find_device, load_backend
from .measure import Curve, decode, prefill
from .memory import HOW
from .page import complain, console, print_json, refused
from .preflight_page import show
from .verdict import conclude


def preflight(
    path: Path,
    context: int,
    backend: str,
    device: str | None,
    *,
    seconds: float,
    png: Path | None,
    as_json: bool,
) -> int:
    """Examine a configuration and print the report; exit code 1 where a layer is not served within the budget.

    Args:
        path: A config.json.
        context: Tokens.
        backend: Name of the backend.
        device: Where; the GPU if there is one.
        seconds: How long to measure, all kinds of layers together.
        png: Where to draw to, or None.
        as_json: Print JSON and nothing else.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        refused("seconds", "a number above 0", seconds)
    check_png(png)
    config, where = read(path), find_device(device)
    subject = load_backend(backend)
    planned = plans(config, context, where)
    told = None if as_json else progress
    report = examine(config, planned, context, backend, subject, seconds / len(planned), told)
    report = {"config": str(path), **report}
    if as_json:
        print_json(report)
    else:
        show(console(), report)
    if png is not None:
        draw(report, png)
    return 0 if report["ok"] else 1


def examine(
    config: dict[str, Any],
    planned: dict[str, Plan],
    context: int,
    name: str,
    backend: Backend,
    seconds: float,
    told: Any,  # noqa: ANN401 - a function of a sentence, or None
) -> dict[str, Any]:
    """Examine every kind of layer, and add up the model."""
    first = next(iter(planned.values()))
    found: dict[str, Any] = {}
    for kind, plan in planned.items():
        if told is not None:
            told(f"measuring one of the {plan.layer.count} layers of kind {kind!r} …")
        found[kind] = layer(config, plan, context, name, backend, seconds)
    facts = {
        "model_type": config.get("model_type"),
        "source": config.get("_source", {}).get("model") if isinstance(config.get("_source"), dict) else None,
        "machine": describe(first.device),
        "memory_measured_by": HOW[first.device.type],
        "requested_backend": name,
        "dtype": str(first.dtype).removeprefix("torch."),
        "context": context,
        "target_context": target_context(config),
        "layers": found,
    }
    return {**facts, **conclude(facts)}


def layer(
    config: dict[str, Any], plan: Plan, context: int, name: str, backend: Backend, seconds: float
) -> dict[str, Any]:
    """Examine one kind of layer: what it is, who serves it, how exactly, how fast, in how much memory."""
    one = plan.layer
    trained = trained_context(config, plan.rope)
    cached = one.cached_dim * plan.dtype.itemsize
    facts: dict[str, Any] = {
        "count": one.count, "heads": one.heads, "key_heads": one.groups, "head_dim": one.head_dim,
        "value_dim": one.value_dim, "rotary_dim": one.rotary_dim, "window": one.window, "ahead": one.ahead,
        "chunk": one.chunk, "causal": one.causal, "softcap": one.softcap, "sinks": one.sinks, "scale": one.scale,
        "pairing": one.pairing, "omits": list(one.omits), "trained_context": trained,
        "rotation": None if trained is None else describe_rotation(plan, context, trained),
        "cache_bytes_per_token": cached,
        "cache_bytes": one.count * cached * context,
        "cache_bytes_windowed": one.count * cached * min(context, plan.width or context),
        "backend": chosen(plan, context, name, backend),
        "prefill": None, "decode": None, "accuracy": None,
    }  # fmt: skip
    if facts["backend"]["declined"] is not None:
        return facts
    long, run = prefill(backend, plan, context, 0.8 * seconds)
    short = decode(backend, plan, context, 0.2 * seconds)
    facts["prefill"], facts["decode"] = curve(long), curve(short)
    longest = context if run is not None else max((point.length for point in short.points), default=0)
    if longest:
        facts["accuracy"] = check(backend, plan, longest, run)
    return facts


def chosen(plan: Plan, context: int, name: str, backend: Backend) -> dict[str, Any]:
    """Say which backend serves the layer's operations at this length, or why it does not; runs nothing."""
    one = plan.layer
    q, k = (shaped(plan, heads, context, one.head_dim) for heads in (one.heads, one.groups))
    v = shaped(plan, one.groups, context, one.value_dim)
    calls: dict[str, Any] = {"attention": ((q, k, v), plan.options())}
    if plan.rotation is not None:
        position = torch.zeros(1, dtype=torch.int64, device=plan.device).expand(context)
        calls["rotate_qk"] = ((q, k, position, plan.rotation), {"pairing": one.pairing})
    served, passed, declined = {}, {}, None
    for operation, (args, options) in calls.items():
        if name == "auto":
            try:
                served[operation], passed[operation] = auto.choose(operation, *args, **options)
            except Unsupported as refusal:
                declined = f"{operation}: {refusal.reason}"
        else:
            reason = backend.declines(operation, *args, **options)
            served[operation] = name
            declined = declined if reason is None else f"{operation}: {reason}"
    return {"serves": None if declined else served, "passed_over": passed, "declined": declined}


def shaped(plan: Plan, heads: int, tokens: int, dim: int) -> Tensor:
    """Make a tensor that has a shape but next to no memory, to ask about."""
    one = torch.empty(dim, dtype=plan.dtype, device=plan.device)
    return one.as_strided((1, heads, tokens, dim), (0, 0, 0, 1))


def curve(found: Curve) -> dict[str, Any]:
    """Write a measured curve for machines."""
    return {
        "seconds": found.seconds(), "peak_bytes": found.peak_bytes(),
        "measured_at": found.points[-1].length if found.points else None,
        "extrapolated": found.extrapolated, "growth": f"n^{found.growth}", "stopped": found.stopped,
        "points": [point._asdict() for point in found.points],
    }  # fmt: skip


def progress(sentence: str) -> None:
    """Say on stderr what takes time."""
    print(sentence, file=sys.stderr, flush=True)


def check_png(png: Path | None) -> None:
    """Refuse a picture that cannot be written, before a minute is spent on it."""
    if png is None:
        return
    if png.suffix.lower() != ".png":
        refused("png", "a file name that ends in .png", png)
    if png.is_dir():
        refused("png", "a file", f"the directory {png}")
    if not png.parent.is_dir():
        refused("png", "a file in a folder that exists", png)
    if not os.access(png if png.exists() else png.parent, os.W_OK):
        refused("png", "a file that can be written", png)


def draw(report: dict[str, Any], png: Path) -> None:
    """Draw the picture, or say why there is none."""
    try:
        from .picture import picture  # noqa: PLC0415 - matplotlib is an extra
    except ImportError as error:
        complain(f"no picture: {error}; pip install 'longspan[bench]' brings matplotlib")
        return
    try:
        picture(report, png)
    except OSError as error:
        refused("png", "a file that can be written", f"{png}: {error.strerror}")
    progress(f"drawn: {png}")
