"""Laws of attention on dense tensors, as functions over a backend.

A law takes a backend, a problem and a device; it returns the worst error as a fraction of its budget, raises
AssertionError where the backend breaks it, and lets `Unsupported` through.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import AttentionState, masks
from longspan.spec.checks import floating

from .budget import Bound, attention_bounds, worst
from .calls import Device, backward, call, compare, watched
from .problems import Attention


def attention_is_its_definition(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Out and lse are those of exact attention in float64, for every mask, dtype, layout and option."""
    of = problem.inputs(device)
    state, bound = call(backend, of), attention_bounds(*of.arguments, **of.options)
    error = compare(state, bound)
    if state.out.dtype != of.q.dtype:
        finer_than(of.q.dtype, state.out, bound["out"].truth)
    return error


def finer_than(dtype: torch.dtype, out: Tensor, truth: Tensor) -> None:
    """See that out was not rounded to a dtype on its way, where the truth lies between that dtype's numbers."""
    coarse = truth.to(dtype).double()
    between = (truth - coarse).abs() > 0.1 * torch.finfo(dtype).eps * truth.abs()
    between &= truth.abs() > torch.finfo(dtype).tiny
    kept = out[between]
    assert kept.numel() < 16 or not torch.equal(kept, kept.to(dtype).to(out.dtype)), f"out was rounded to {dtype}"


def gradients_are_exact(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Gradients of q, k, v and the sink through out are those of the definition."""
    return gradients(backend, problem, device, through_lse=False)


def gradients_flow_through_lse(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Gradients through out and lse together are those of the definition."""
    return gradients(backend, problem, device, through_lse=True)


def gradients(backend: Backend, problem: Attention, device: Device, *, through_lse: bool) -> float:
    """Compare a backward pass with its bounds."""
    of = problem.inputs(device)
    d_lse = of.d_lse if through_lse else None
    bound = attention_bounds(*of.arguments, **of.options, d_out=of.d_out, d_lse=d_lse)
    found = backward(backend, of, through_lse=through_lse)
    return max(worst(f"d{name}", x, bound[f"d{name}"]) for name, x in found.items())


def keys_split_anywhere(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Attention to two parts of the keys, merged, with the sink added once at the end, is attention to all."""
    of = problem.inputs(device)
    options, n = of.options, problem.n
    total = options["k_offset"] + n
    placed = options["q_offset"]
    if placed is None and "documents" not in problem.mask and "lengths" not in problem.mask:
        placed = total - problem.m  # what bottom-right means for the whole
    cut = problem.seed % (n + 1)
    wide = torch.float64 if of.q.dtype == torch.float64 else torch.float32
    shared = {**options, "sink": None, "q_offset": placed, "out_dtype": wide}
    parts = [
        backend.attention(
            of.q, of.k[:, :, keys], of.v[:, :, keys],
            **{**shared, "k_offset": options["k_offset"] + keys.start},
        )
        for keys in (slice(cut, n), slice(0, cut))
    ]  # fmt: skip
    merged = backend.merge(*parts)
    merged = merged if options["sink"] is None else backend.add_sink(merged, options["sink"])
    bound = attention_bounds(*of.arguments, **options)
    return compare(AttentionState(merged.out.to(options["out_dtype"] or of.q.dtype), merged.lse), bound)


def keys_have_no_order(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Without a mask, permuting the keys with their values changes nothing."""
    of = problem.inputs(device)
    order = torch.randperm(problem.n, generator=torch.Generator().manual_seed(problem.seed)).to(device)
    state = backend.attention(of.q, of.k[:, :, order], of.v[:, :, order], **of.options)
    return compare(state, attention_bounds(*of.arguments, **of.options))


def groups_are_repeated_heads(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """Query heads that share a key head attend as if each had its own copy of it."""
    of = problem.inputs(device)
    k, v = (repeat(x, "b g n d -> b (g r) n d", r=problem.h // problem.g) for x in (of.k, of.v))
    bound = attention_bounds(of.q, k, v, **of.options)
    return max(compare(call(backend, of), bound), compare(backend.attention(of.q, k, v, **of.options), bound))


def wide_windows_are_causal(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """A window as long as the sequence is causal attention; a window of one key copies its value."""
    of = problem.inputs(device)
    bound = attention_bounds(*of.arguments, **{**of.options, "mask": masks.causal()})
    error = compare(call(backend, of, mask=masks.window(problem.n + problem.m + 1)), bound)
    copied = call(backend, of, mask=masks.window(1), sink=None).out[:, :, max(problem.m - problem.n, 0) :]
    own = of.v[:, :, max(problem.n - problem.m, 0) :]
    truth = repeat(own, "b g n e -> b (g r) n e", r=problem.h // problem.g).double()
    # The value is copied but for the rounding of a weight of one.
    rounding = torch.finfo(of.q.dtype).eps + 4 * torch.finfo(floating(of.q)).eps
    return max(error, worst("the copied value", copied, Bound(truth, rounding * truth.abs())))


def later_queries_stand_alone(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """The last queries of a problem, asked on their own, get the same answer (chunked prefill, decode)."""
    of = problem.inputs(device)
    start = problem.seed % (problem.m + 1)
    bound = attention_bounds(*of.arguments, **of.options)
    late = {name: Bound(x.truth[:, :, start:], x.budget[:, :, start:]) for name, x in bound.items()}
    return compare(backend.attention(of.q[:, :, start:], of.k, of.v, **of.options), late)


def blind_rows_are_zero(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """A query that sees no key gets out = 0 and lse = -inf (or its sink), passes no gradient, and is never NaN."""
    of = problem.inputs(device)
    blind = masks.lengths([0] * problem.b)
    state = call(backend, of, mask=blind, q_offset=None)
    sink = of.options["sink"]
    expected = torch.full_like(state.lse, -torch.inf)
    if sink is not None:
        expected = rearrange(sink.to(state.lse.dtype), "h -> 1 h 1").expand_as(expected)
    assert bool((state.out == 0).all()), "out is not 0 where no key is seen"
    assert torch.equal(state.lse, expected), "lse is not that of a row without keys"
    found = backward(backend, of, through_lse=False, mask=blind, q_offset=None)
    assert all(bool((x == 0).all()) for name, x in found.items() if name != "sink"), (
        "a row without keys passes a gradient"
    )
    return 0.0


def dead_slots_change_nothing(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """NaN and infinity in keys that no query sees change no bit, forward or backward."""
    same = {f: getattr(problem, f) for f in problem.__dataclass_fields__}
    clean, dirty = (Attention(**{**same, "dead": dead}).inputs(device) for dead in (0.5, float("nan")))
    first, second = call(backend, clean), call(backend, dirty)
    assert torch.equal(first.out, second.out), "a dead slot changed out"
    assert torch.equal(first.lse, second.lse), "a dead slot changed lse"
    before, after = (backward(backend, of, through_lse=False) for of in (clean, dirty))
    for name, x in before.items():
        assert torch.equal(x, after[name]), f"a dead slot changed d{name}"
    return 0.0


def calls_repeat_bitwise(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """The same call gives the same bits, and with ``deterministic=True`` so does its gradient."""
    of = problem.inputs(device)
    first, second = (call(backend, of) for _ in range(2))
    assert torch.equal(first.out, second.out), "out is not repeatable"
    assert torch.equal(first.lse, second.lse), "lse is not repeatable"
    before, after = (backward(backend, of, through_lse=False, deterministic=True) for _ in range(2))
    for name, x in before.items():
        assert torch.equal(x, after[name]), f"d{name} is not repeatable"
    return 0.0


def arguments_survive(backend: Backend, problem: Attention, device: Device = "cpu") -> float:
    """No argument is written to."""
    of = problem.inputs(device)
    watched(call, backend, of)
    watched(backward, backend, of, through_lse=True)
    return 0.0
