"""Laws of rotary embedding, as functions over a backend."""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import Rotation, angle, rotate
from longspan.spec.pairing import Pairing, join, split

from .budget import ANGLE, Bound, epsilon, rotate_bound, worst
from .calls import Device, leaves, pull, watched
from .problems import Rotate


def partner(x: Tensor, planes: int, pairing: Pairing) -> Tensor:
    """The other coordinate of each plane; NaN in the tail, which has none."""
    real, imag = split(x[..., : 2 * planes], pairing)
    tail = torch.full_like(x[..., 2 * planes :], torch.nan)
    return torch.cat([join(imag, real, pairing), tail], -1)


def bound(x: Tensor, position: Tensor, rotation: Rotation, pairing: Pairing) -> Bound:
    """Bound the rotation of x."""
    truth = rotate(x.double(), position, rotation, pairing=pairing)
    return rotate_bound(truth, x, position, rotation, partner(x, rotation.inv_freq.shape[-1], pairing))


def rotation_is_its_definition(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """Every plane turns by position · inv_freq, exactly at every position below 2^31, and the tail stays."""
    of = problem.inputs(device)
    truth = bound(of.q, of.position, of.rotation, problem.pairing)
    turned = watched(backend.rotate, of.q, of.position, of.rotation, pairing=problem.pairing)
    return kept("rotate", turned, of.q.dtype, truth)


def kept(name: str, turned: Tensor, dtype: torch.dtype, truth: Bound) -> float:
    """Compare turned heads with their bound, in the dtype they came in."""
    assert turned.dtype == dtype, f"the dtype of {name} became {turned.dtype}"
    return worst(name, turned, truth)


def queries_and_keys_turn_alike(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """One call for queries and keys is two calls, one for each."""
    of = problem.inputs(device)
    q, k = watched(backend.rotate_qk, of.q, of.k, of.position, of.rotation, pairing=problem.pairing)
    return max(
        kept("the query", q, of.q.dtype, bound(of.q, of.position, of.rotation, problem.pairing)),
        kept("the key", k, of.k.dtype, bound(of.k, of.position, of.rotation, problem.pairing)),
    )


def cotangent(x: Tensor, seed: int) -> Tensor:
    """Draw a cotangent of turned heads."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype).to(x.device)


def reversed_speed(rotation: Rotation) -> Rotation:
    """Turn the other way, under the same attention factor."""
    return replace(rotation, inv_freq=-rotation.inv_freq)


def pairs_turn_back_alike(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """Gradients of queries and keys that one call turned are those of two calls, one for each."""
    of = problem.inputs(device)
    heads = {"q": of.q, "k": of.k}
    trained = leaves({**heads}, ("qk", "qk", "q", "k")[problem.seed % 4])
    back = {name: cotangent(x, problem.seed + len(name)) for name, x in heads.items()}
    turned = backend.rotate_qk(*({**heads, **trained}.values()), of.position, of.rotation, pairing=problem.pairing)
    found = pull(turned, trained, tuple(back.values()))
    bounds = {name: bound(back[name], of.position, reversed_speed(of.rotation), problem.pairing) for name in found}
    return max(kept(f"d{name}", x, back[name].dtype, bounds[name]) for name, x in found.items())


def rotations_have_inverses(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """The gradient of a rotation is the rotation back, under the same attention factor."""
    of = problem.inputs(device)
    back = cotangent(of.q, problem.seed)
    x = of.q.detach().requires_grad_()
    found = pull([backend.rotate(x, of.position, of.rotation, pairing=problem.pairing)], {"x": x}, [back])["x"]
    return kept("the gradient", found, x.dtype, bound(back, of.position, reversed_speed(of.rotation), problem.pairing))


def only_distance_matters(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """Moving queries and keys along together leaves every score as it was."""
    of = problem.inputs(device)
    shift = problem.seed % 4096
    q, k = of.q[:, : problem.g], of.k
    planes, pairing = of.rotation.inv_freq.shape[-1], problem.pairing

    def score(moved: int, rotate_by: Backend | None) -> Tensor:
        turn = rotate if rotate_by is None else rotate_by.rotate
        wide = (q.double(), k.double()) if rotate_by is None else (q, k)
        later, earlier = (turn(x, of.position + moved, of.rotation, pairing=pairing) for x in wide)
        return (later.double() * rearrange(earlier.double(), "b h m d -> b h m d").roll(1, dims=2)).sum(-1)

    eps = epsilon(q.dtype) + 2 * ANGLE + 8 * torch.finfo(torch.float32 if q.dtype != torch.float64 else q.dtype).eps
    sizes = [
        of.rotation.attention_factor * (x.double() ** 2 + partner(x, planes, pairing).nan_to_num().double() ** 2).sqrt()
        for x in (q, k)
    ]
    size = (sizes[0] * sizes[1].roll(1, dims=2)).sum(-1)
    size = size + (q.double().abs() * k.double().abs().roll(1, dims=2)).sum(-1)
    far = float(angle(of.position + shift, of.rotation).abs().max()) if of.position.numel() else 0.0
    rounding = torch.finfo(torch.float64).eps * far  # of the angles of the truth itself
    return worst("a score", score(shift, backend), Bound(score(0, None), 2 * (2 * eps + 4 * rounding) * size))


def cached_keys_move(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """Keys under an old rotation, moved to a new one, are the keys under the new rotation."""
    of = problem.inputs(device)
    old, new = of.rotation, Rotation(of.rotation.inv_freq / 3, 1.25, axis=of.rotation.axis)
    once = rotate(of.k.double(), of.position, old, pairing=problem.pairing).to(of.k.dtype)
    moved = watched(backend.rerotate, once, of.position, old, new, pairing=problem.pairing)
    truth = rotate(of.k.double(), of.position, new, pairing=problem.pairing)
    # The cached key was rounded once already, along the whole length of its plane.
    factor = old.attention_factor
    factor = rearrange(factor, "b -> b 1 1 1") if isinstance(factor, Tensor) else factor
    budget = bound(once, of.position, new, problem.pairing).budget * (1 + 1 / factor)
    other = partner(once, old.inv_freq.shape[-1], problem.pairing).nan_to_num()
    rounded = epsilon(once.dtype) * (once.double() ** 2 + other.double() ** 2).sqrt() * (1 + 1.25 / factor)
    return kept("a moved key", moved, of.k.dtype, Bound(truth, budget + 2 * rounded))


def moves_have_inverses(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """The gradient of moving cached keys is the move back, under the same ratio of attention factors."""
    of = problem.inputs(device)
    old, new = of.rotation, Rotation(of.rotation.inv_freq / 3, 1.25, axis=of.rotation.axis)
    back, k = cotangent(of.k, problem.seed), of.k.detach().requires_grad_()
    found = pull([backend.rerotate(k, of.position, old, new, pairing=problem.pairing)], {"k": k}, [back])["k"]
    between = Rotation(old.inv_freq - new.inv_freq, 1.25 / old.attention_factor, axis=old.axis)
    truth, budget = bound(back, of.position, between, problem.pairing)
    # Two angles are subtracted, each off by what one may be; those of the truth are as fine as float64's.
    return kept("the gradient", found, k.dtype, Bound(truth, 3 * budget))
