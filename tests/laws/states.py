"""Laws of states: parts of attention make the whole in any order, and a sink is one more key."""

import torch
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import AttentionState, merge

from .budget import Bound, epsilon, smallest
from .calls import Device, compare
from .problems import Attention


def parts(problem: Attention, device: Device) -> tuple[list[AttentionState], Tensor]:
    """Draw states as if of disjoint keys, some rows of them empty, and one sink per head."""
    draw = torch.Generator().manual_seed(problem.seed)
    dtype = getattr(torch, problem.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (problem.b, problem.h, problem.m)
    states = []
    for _ in range(2 + problem.seed % 3):
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
    return max(compare(backend.merge(*order), bound) for order in orders)


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
    return compare(backend.add_sink(states[0], sink), merged_bound([states[0], key]))
