"""`longspan backends`: what can run here, what cannot, and why."""

from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from longspan.backends import NAMES, registry
from longspan.spec import AttentionState, masks, scaling

from .machine import describe, find_device, said
from .page import console, print_json


def backends(device: str | None, *, as_json: bool) -> int:
    """Print the report; exit code 0."""
    report = examine(find_device(device))
    if as_json:
        print_json(report)
        return 0
    page = console()
    page.print(said(report["machine"]))
    page.print("Fastest first: the order in which `auto` asks. A named backend never hands a problem to another.")
    page.print(
        "Asked about one plain call of each operation: bfloat16, 4 query heads on 2 key heads of dim 64, causal."
    )
    table = Table("backend", "runs here", "serves", "declines")
    for name, found in report["backends"].items():
        table.add_row(name, *row(found))
    page.print(table)
    return 0


def row(found: dict[str, Any]) -> tuple[str, str, str]:
    """Write what was found about one backend: whether it runs, what it serves, what it declines."""
    if found["unavailable"] is not None:
        return f"no: {found['unavailable']}", "–", "–"
    operations = found["declines"]
    served = [name for name, reason in operations.items() if reason is None]
    lost = [f"{name}: {reason}" for name, reason in operations.items() if reason is not None]
    return "yes", "everything" if not lost else ", ".join(served) or "nothing", "\n".join(lost) or "–"


def examine(device: torch.device) -> dict[str, Any]:
    """Ask every backend of the registry, without running anything."""
    calls = representative(device)
    found: dict[str, Any] = {}
    for name in NAMES:
        reason = registry.unavailable(name)
        declines = None
        if reason is None:
            backend = registry.module(name)
            declines = {
                operation: backend.declines(operation, *args, **options) for operation, (args, options) in calls.items()
            }
        found[name] = {"unavailable": reason, "declines": declines}
    return {"machine": describe(device), "backends": found}


def representative(device: torch.device) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One plain call of every operation: eight tokens of a small layer in bfloat16."""

    def half(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    def whole(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v = half(1, 4, 8, 64), half(1, 2, 8, 64), half(1, 2, 8, 64)
    position, rotation = torch.arange(8, device=device), scaling.none(64, device=device)
    causal = {"mask": masks.causal()}
    state = AttentionState(q.float(), q[..., 0].float())
    ragged = (half(8, 4, 64), half(8, 2, 64), half(8, 2, 64), whole(5, 3), whole(5, 3))
    pages = (half(8, 4, 64), whole(8), half(1, 2, 8, 64), half(1, 2, 8, 64), whole(0)[None], whole(8))
    new, slots = half(8, 2, 64), torch.zeros(8, dtype=torch.int64, device=device)
    return {
        "rotate": ((q, position, rotation), {}),
        "rotate_qk": ((q, k, position, rotation), {}),
        "rerotate": ((k, position, rotation, rotation), {}),
        "attention": ((q, k, v), causal),
        "attention_varlen": (ragged, causal),
        "attention_paged": (pages, causal),
        "append_": ((new, new, half(1, 2, 8, 64), half(1, 2, 8, 64), slots), {}),
        "merge": ((state, state), {}),
        "add_sink": ((state, torch.zeros(4, device=device)), {}),
    }
