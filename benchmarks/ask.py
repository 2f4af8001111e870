"""What one contestant is asked: tensors, options, and the gradients that are wanted; of a cell, or of a gate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cells import Cell
from torch import Tensor

from longspan.laws import Attention, Rotate
from longspan.spec import Rotation, inv_freq

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Ask:
    """One call.

    Attributes:
        cell: Whose features it has; its sizes are those of the tensors.
        inputs: ``(q, k, v)``, or ``(q, k)`` of a rotation.
        cotangents: Gradients of the results; empty where the function itself is raced.
        mask: Source of the mask of attention.
        options: Keyword arguments of the operation, as longspan's backends take them.
    """

    cell: Cell
    inputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...] = ()
    mask: str = "everything()"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Any]:
        """The options that attention to quantised heads takes, too."""
        return {name: x for name, x in self.options.items() if name in {"mask", "scale", "q_offset", "k_offset"}}


def of_problem(cell: Cell, problem: Attention | Rotate, device: torch.device | str) -> Ask:
    """Ask what a gate asks."""
    if isinstance(problem, Rotate):
        turned = problem.inputs(device)
        options = {"position": turned.position, "rotation": turned.rotation}
        draw = torch.Generator().manual_seed(problem.seed + 1)
        back = (torch.randn(x.shape, generator=draw).to(x) for x in (turned.q, turned.k)) if cell.backward else ()
        return Ask(cell, (turned.q, turned.k), tuple(back), options=options)
    drawn = problem.inputs(device)
    return Ask(cell, drawn.arguments, (drawn.d_out,) if cell.backward else (), problem.mask, drawn.options)


def of_cell(cell: Cell, seed: int, device: torch.device | str) -> Ask:
    """Ask what is timed: random numbers at the cell's sizes, laid out as models lay them out."""
    draw = torch.Generator(device).manual_seed(seed)

    def heads(count: int, tokens: int) -> Tensor:
        """Heads inside tokens, as projections leave them; a cache holds tokens inside heads."""
        shape = (cell.b, count, tokens, cell.d) if cell.decodes else (cell.b, tokens, count, cell.d)
        x = torch.randn(shape, generator=draw, dtype=torch.bfloat16, device=device)
        return x if cell.decodes else x.transpose(1, 2)

    q, k = heads(cell.h, cell.m), heads(cell.g, cell.n)
    if cell.rotary:
        options = {
            "position": torch.arange(cell.m, device=device),
            "rotation": Rotation(inv_freq(cell.d, base=5e5, device=device)),
        }
        return Ask(
            cell, (q, k), (heads(cell.h, cell.m), heads(cell.g, cell.n)) if cell.backward else (), options=options
        )
    mask = cell.build_mask()
    options: dict[str, Any] = {"mask": Attention(m=cell.m, n=cell.n, mask=mask).build_mask()}
    if cell.softcap:
        options["softcap"] = cell.softcap
    if cell.sinks:
        options["sink"] = torch.randn(cell.h, generator=draw, device=device)
    back = (heads(cell.h, cell.m),) if cell.backward else ()
    return Ask(cell, (q, k, heads(cell.g, cell.n)), back, mask, options)


def bind(ask: Ask, function: Callable[..., tuple[Tensor, ...]]) -> Call:
    """Make the call that is checked and timed: the function, or its gradient alone."""
    if not ask.cotangents:
        return lambda: function(*ask.inputs)
    leaves = tuple(x.detach().requires_grad_() for x in ask.inputs)
    results = function(*leaves)
    return lambda: torch.autograd.grad(results, leaves, ask.cotangents, retain_graph=True)


def table(ask: Ask) -> tuple[Tensor, Tensor]:
    """Cosine and sine as rotaries with a table want them, [1, 1, m, d] in float32 from float64 angles."""
    position, rotation = ask.options["position"], ask.options["rotation"]
    angle = position.double()[:, None] * rotation.inv_freq % (2 * math.pi)
    angle = torch.cat([angle, angle], -1)[None, None]
    return angle.cos().float(), angle.sin().float()
