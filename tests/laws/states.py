"""Laws of states: parts of attention make the whole in any order, and a sink is one more key."""

import torch
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import AttentionState, merge
from longspan.spec.state import weights

from .budget import Bound, epsilon, smallest, worst
from .calls import Device, compare, pull, typed, watched
from .problems import Attention


def parts(problem: Attention, device: Device) -> tuple[list[AttentionState], Tensor]:
    """Draw states as if of disjoint keys, some rows of them empty, and one sink per head."""
    draw = torch.Generator().manual_seed(problem.seed)
    dtype = getattr(torch, problem.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (problem.b, problem.h, problem.m)
    states = []
    for _ in range(40 if problem.seed % 8 == 7 else 2 + problem.seed % 3):  # as many parts as a long cache has
        empty = torch.rand(shape, generator=draw) < 0.25
        lse = (problem.amplitude * 10 * torch.randn(shape, generator=draw)).masked_fill(empty, -torch.inf).to(wide)
        out = (
            (problem.mean + torch.randn(*shape, problem.e, generator=draw)).masked_fill(empty[..., None], 0.0).to(dtype)
        )
        states.append(AttentionState(out.to(device), lse.to(device)))
    sink = ((problem.sink or 0.0) * torch.randn(problem.h, generator=draw)).to(wide).to(device)
    return states, sink


def merged_bound(states: list[AttentionState]) -> dict[str, Bound]:
    """Bound the merge of states: rounding of the result, and float32 weights."""
    truth = merge(*(AttentionState(state.out.double(), state.lse.double()) for state in states))
    finite = [state.lse.double().nan_to_num(neginf=0.0).abs() for state in states]
    largest = torch.stack(finite).amax(0)
    fine = 8 * torch.finfo(states[0].lse.dtype).eps * (1 + largest)
    size = merge(*(AttentionState(state.out.double().abs(), state.lse.double()) for state in states)).out
    eps = epsilon(states[0].out.dtype)
    budget = eps * truth.out.abs() + fine[..., None] * size + smallest(states[0].out.dtype)
    return {"out": Bound(truth.out, 2 * budget), "lse": Bound(truth.lse, 2 * fine)}


def merging_has_no_order(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Merging is exact, whatever the order; a state that saw no key changes nothing."""
    states, _ = parts(problem, device)
    bound = merged_bound(states)
    nothing = AttentionState(torch.zeros_like(states[0].out), torch.full_like(states[0].lse, -torch.inf))
    orders = (states, states[::-1], [*states[1:], states[0]], [nothing, *states], [*states, nothing])
    dtype, lse_dtype = states[0].out.dtype, states[0].lse.dtype
    of = torch.float64 if lse_dtype == torch.float64 else torch.float32
    return max(compare(typed(watched(backend.merge, *order), of, dtype), bound) for order in orders)


def merging_has_no_brackets(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Merging two by two is merging all at once."""
    states, _ = parts(problem, device)
    states = [AttentionState(state.out.to(state.lse.dtype), state.lse) for state in states]
    bound = {name: Bound(x.truth, len(states) * x.budget) for name, x in merged_bound(states).items()}
    left, right = states[0], states[-1]
    for state in states[1:]:
        left = backend.merge(left, state)
    for state in states[-2::-1]:
        right = backend.merge(state, right)
    return max(compare(left, bound), compare(right, bound))


def sinks_are_keys_without_value(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Adding a sink is merging with one key whose score is the sink and whose value is 0."""
    states, sink = parts(problem, device)
    key = AttentionState(torch.zeros_like(states[0].out), sink[None, :, None].expand_as(states[0].lse))
    whole = typed(watched(backend.add_sink, states[0], sink), sink.dtype, states[0].out.dtype)
    return compare(whole, merged_bound([states[0], key]))


def gradient_bound(states: list[AttentionState], d_out: Tensor, d_lse: Tensor) -> list[dict[str, Bound]]:
    """Bound the gradient of a merge with shares w: ``d_out = w dO`` and ``d_lse = w (dO · (o - O) + dL)`` of each."""
    wide = [AttentionState(*(x.detach().double().requires_grad_() for x in state)) for state in states]
    whole = merge(*wide)
    truth = torch.autograd.grad(whole, [x for state in wide for x in state], (d_out.double(), d_lse.double()))
    whole, d_out, d_lse = AttentionState(*(x.detach() for x in whole)), d_out.double(), d_lse.double()
    eps, tiny = epsilon(states[0].out.dtype), smallest(states[0].out.dtype)
    largest = torch.stack([state.lse.detach().nan_to_num(neginf=0.0).abs() for state in wide]).amax(0)
    fine = 8 * torch.finfo(states[0].lse.dtype).eps * (1 + largest)
    bounds = []
    for state, d_o, d_l in zip(wide, truth[::2], truth[1::2], strict=True):
        share = weights(state.lse.detach()[..., None], whole.lse)[..., 0]
        terms = (d_out.abs() * (state.out.detach().abs() + whole.out.abs())).sum(-1) + d_lse.abs()
        rounded = eps * ((d_out * whole.out) ** 2).sum(-1).sqrt()  # of O, where it is read back
        off = share * (fine * terms + rounded)
        bounds.append(
            {
                "out": Bound(d_o, 2 * (eps * d_o.abs() + fine[..., None] * d_o.abs() + tiny)),
                "lse": Bound(d_l, 2 * (off + tiny)),
            }
        )
    return bounds


def cotangents(state: AttentionState, seed: int) -> tuple[Tensor, Tensor]:
    """Draw cotangents of a state's out and lse."""
    draw = torch.Generator().manual_seed(seed)
    d_out, d_lse = (torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in state)
    return d_out, d_lse


def merged_gradients_are_exact(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Gradients flow through a merge to every part, through its out and its lse."""
    states, _ = parts(problem, device)
    states = [AttentionState(*(x.requires_grad_() for x in state)) for state in states]
    d_out, d_lse = cotangents(states[0], problem.seed)
    inputs = {f"d{name} of part {i}": x for i, state in enumerate(states) for name, x in state._asdict().items()}
    found = pull(backend.merge(*states), inputs, (d_out, d_lse))
    bounds = [x for bound in gradient_bound(states, d_out, d_lse) for x in (bound["out"], bound["lse"])]
    return max(worst(name, x, bound) for (name, x), bound in zip(found.items(), bounds, strict=True))


def sink_gradients_are_exact(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Gradients flow through an added sink to the state, and to the sink."""
    states, sink = parts(problem, device)
    state, sink = AttentionState(*(x.requires_grad_() for x in states[0])), sink.requires_grad_()
    d_out, d_lse = cotangents(state, problem.seed)
    found = pull(backend.add_sink(state, sink), {"out": state.out, "lse": state.lse, "sink": sink}, (d_out, d_lse))
    key = AttentionState(torch.zeros_like(state.out), sink.detach()[None, :, None].expand_as(state.lse))
    bound, of_key = gradient_bound([state, key], d_out, d_lse)
    summed = of_key["lse"].truth.sum((0, 2))
    adding = 8 * torch.finfo(sink.dtype).eps * of_key["lse"].truth.abs().sum((0, 2))
    bound["sink"] = Bound(summed, of_key["lse"].budget.sum((0, 2)) + adding)
    return max(worst(f"d{name}", x, bound[name]) for name, x in found.items())
