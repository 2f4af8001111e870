"""Error of a backend against the specification in float64, on sampled query rows at the full length.

A row of attention costs O(n), so that a few of them can be checked exactly at any length. The budget is the laws'.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from longspan.backends import Backend
from longspan.laws import Bound, attention_bounds, worst
from longspan.laws.rotation import bound as rotation_bound
from longspan.spec import AttentionState, bounds, masks

from .config import Plan
from .measure import Run, draw

ROWS: Final = 8
KEYS: Final = 2**21  # keys of all heads together that are checked; beyond, a sample of the key heads


def sample(length: int) -> Tensor:
    """Pick the first row, the last, the middle one, and some at random."""
    drawn = torch.randint(length, (ROWS - 3,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0, length // 2, length - 1]), drawn]).unique()


def check(backend: Backend, plan: Plan, length: int, run: Run | None) -> dict[str, Any]:
    """Compare sampled rows with the truth.

    Args:
        backend: What is examined.
        plan: The layer.
        length: Tokens of the context.
        run: A prefill of that length; where there is none, the sampled queries attend on their own.
    """
    rows = sample(length).to(plan.device)
    with torch.no_grad():
        q, k, turned_q, turned_k, v, state = chosen(backend, plan, length, rows, run)
        # The last query on its own is what a decoder asks: it stands at the end of the keys, unsaid.
        alone = backend.attention(turned_q[:, :, -1:], turned_k, v, **plan.options())
        ends = {
            "rotation": lambda: rotation_error(plan, rows, [(q, turned_q), (k, turned_k[:, :, rows])]),
            "attention": lambda: attention_error(plan, rows, turned_q, turned_k, v, state),
            "decode": lambda: attention_error(plan, rows[-1:], turned_q[:, :, -1:], turned_k, v, alone),
        }
        found = {name: judged(end) for name, end in ends.items()}
    problems = [problem for _, problem in found.values() if problem is not None]
    fractions = [fraction for fraction, _ in found.values() if fraction is not None]
    return {
        "inside": not problems,
        "worst_fraction_of_budget": None if problems else max(fractions),
        "rotation": found["rotation"][0],
        "attention": found["attention"][0],
        "decode": found["decode"][0],
        "length": length,
        "rows": rows.tolist(),
        "key_heads": len(heads(plan, length)),
        "of_prefill": run is not None,
        "problem": "; ".join(problems) or None,
    }


def judged(error: Callable[[], float]) -> tuple[float | None, str | None]:
    """Return the error as a fraction of its budget, or None and how it left the budget."""
    try:
        return error(), None
    except AssertionError as outside:
        return None, str(outside)


def chosen(
    backend: Backend, plan: Plan, length: int, rows: Tensor, run: Run | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, AttentionState]:
    """Take the sampled rows of q, k and turned q, all turned keys and values, and the sampled rows of the result."""
    if run is not None:
        state = AttentionState(run.state.out[:, :, rows], run.state.lse[:, :, rows])
        return run.q[:, :, rows], run.k[:, :, rows], run.turned_q[:, :, rows], run.turned_k, run.v, state
    q, k, v = draw(plan, len(rows), length)
    if plan.rotation is None:
        turned_q, turned_k = q, k
    else:
        position, pairing = torch.arange(length, device=plan.device), plan.layer.pairing
        turned_q = backend.rotate(q, rows, plan.rotation, pairing=pairing)
        turned_k = backend.rotate(k, position, plan.rotation, pairing=pairing)
    parts = [
        backend.attention(turned_q[:, :, at : at + 1], turned_k, v, q_offset=row, **plan.options())
        for at, row in enumerate(rows.tolist())
    ]
    state = AttentionState(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))
    return q, k[:, :, rows], turned_q, turned_k, v, state


def rotation_error(plan: Plan, rows: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Compare turned rows with the truth, as a fraction of the budget."""
    if plan.rotation is None:
        return 0.0
    names = ("the turned query", "the turned key")
    return max(
        worst(name, turned, rotation_bound(x, rows, plan.rotation, plan.layer.pairing))
        for name, (x, turned) in zip(names, pairs, strict=True)
    )


def attention_error(plan: Plan, rows: Tensor, q: Tensor, k: Tensor, v: Tensor, state: AttentionState) -> float:
    """Compare sampled rows of out and lse with the truth, one key head after the other."""
    length, share = k.shape[2], plan.layer.heads // plan.layer.groups
    seen = bounds(plan.mask, 1, length, length, device=plan.device)
    options: dict[str, Any] = plan.options() | {"mask": masks.spans(seen.first[0, rows], seen.last[0, rows])}
    error = 0.0
    for head in heads(plan, length):
        mine = slice(head * share, (head + 1) * share)
        sink = None if options["sink"] is None else options["sink"][mine]
        found: dict[str, Bound] = attention_bounds(
            q[:, mine], k[:, head : head + 1], v[:, head : head + 1], **{**options, "sink": sink}
        )
        error = max(
            error,
            worst("out", state.out[:, mine], found["out"]),
            worst("lse", state.lse[:, mine], found["lse"]),
        )
    return error


def heads(plan: Plan, length: int) -> list[int]:
    """Which key heads are checked: all where that is quick, else some that are spread evenly."""
    count = min(plan.layer.groups, max(1, KEYS // length))
    return sorted({index * plan.layer.groups // count for index in range(count)})
