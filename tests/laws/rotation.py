"""Laws of rotary embedding, as functions over a backend."""

import torch
from einops import rearrange
from torch import Tensor

from longspan.backends import Backend
from longspan.spec import Rotation, angle, rotate
from longspan.spec.pairing import Pairing, join, split

from .budget import ANGLE, Bound, epsilon, rotate_bound, worst
from .problems import Rotate

Device = torch.device | str


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
    turned = backend.rotate(of.q, of.position, of.rotation, pairing=problem.pairing)
    assert turned.dtype == of.q.dtype, f"the dtype became {turned.dtype}"
    return worst("rotate", turned, truth)


def queries_and_keys_turn_alike(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """One call for queries and keys is two calls, one for each."""
    of = problem.inputs(device)
    q, k = backend.rotate_qk(of.q, of.k, of.position, of.rotation, pairing=problem.pairing)
    return max(
        worst("the query", q, bound(of.q, of.position, of.rotation, problem.pairing)),
        worst("the key", k, bound(of.k, of.position, of.rotation, problem.pairing)),
    )


def rotations_have_inverses(backend: Backend, problem: Rotate, device: Device = "cpu") -> float:
    """The gradient of a rotation is the rotation back, under the same attention factor."""
    of = problem.inputs(device)
    x = of.q.detach().requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(problem.seed), dtype=torch.float64)
    cotangent = cotangent.to(of.q.dtype).to(device)
    (found,) = torch.autograd.grad(backend.rotate(x, of.position, of.rotation, pairing=problem.pairing), x, cotangent)
    back = Rotation(-of.rotation.inv_freq, of.rotation.attention_factor, axis=of.rotation.axis)
    return worst("the gradient", found, bound(cotangent, of.position, back, problem.pairing))


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
    moved = backend.rerotate(once, of.position, old, new, pairing=problem.pairing)
    truth = rotate(of.k.double(), of.position, new, pairing=problem.pairing)
    # The cached key was rounded once already, along the whole length of its plane.
    budget = bound(once, of.position, new, problem.pairing).budget * (1 + 1 / old.attention_factor)
    other = partner(once, old.inv_freq.shape[-1], problem.pairing).nan_to_num()
    rounded = epsilon(once.dtype) * (once.double() ** 2 + other.double() ** 2).sqrt() * (1 + new.attention_factor)
    return worst("a moved key", moved, Bound(truth, budget + 2 * rounded))
