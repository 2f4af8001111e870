"""The gate of `longspan tune`: what a choice must pass before it is timed, and a winner before it is kept.

The error budget of the laws, against the specification in float64, on ragged problems with every output fresh and full
of NaN; and for a winner the tuned problem itself, whose rows are checked in three stretches.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from longspan.autotune import Case, Family
from longspan.backends import Backend
from longspan.laws import Attention, Bound, Rotate, attention_bounds, worst
from longspan.laws.caches import PAGES, appending_is_concatenation, pages_are_gathered_keys
from longspan.laws.problems import Inputs
from longspan.laws.rotation import queries_and_keys_turn_alike
from longspan.laws.states import merged_bound
from longspan.spec import AttentionState, bounds, masks

STRETCH: Final = 48  # queries of a long problem that are checked together
OPTIONS: Final = ("scale", "softcap", "sink", "alibi", "out_dtype")  # of attention, that a problem may have


def gate(family: Family, case: Case, device: str, *, whole: bool) -> float:
    """Run a kernel under the choice in force and return its worst error as a fraction of what rounding allows.

    Args:
        family: Whose backend runs.
        case: The key, and the problem that it is tuned on.
        device: Where.
        whole: Whether to check the tuned problem itself, in place of small ones.

    Raises:
        AssertionError: When some element is off by more.
    """
    backend: Any = import_module(family.backend)
    try:
        check = CHECKS[family.operation]
    except KeyError:
        msg = f"the gate knows how to check {', '.join(CHECKS)}, and not {family.operation!r} of {family.name}"
        raise ValueError(msg) from None
    found = max(check(backend, case, device, whole=whole))
    if found == 0.0:
        msg = f"the gate saw no rounding at all in {family.name}: its problems have no queries"
        raise RuntimeError(msg)
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Have PyTorch hand out memory full of NaN, as it does when asked for determinism."""
    fill: Any = torch.utils.deterministic
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, fill.fill_uninitialized_memory = fill.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)  # noqa: FBT003 - PyTorch's signature
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        fill.fill_uninitialized_memory = filled


def attention(backend: Backend, case: Case, device: str, *, whole: bool) -> Iterator[float]:
    """Check out and lse."""
    for problem in [] if whole else problems(case):
        of, bound = posed(case, problem, device, gradient=False)
        with poisoned():
            state = backend.attention(*of.arguments, **of.options)
        yield max(worst("out", state.out, bound["out"]), worst("lse", state.lse, bound["lse"]))
    if whole:
        q, k, v = heads(case, device)
        with poisoned():
            state = backend.attention(q, k, v, mask=mask_of(case, q, k))
        for rows, bound in stretches(case, q, k, v):
            yield max(
                worst("out", state.out[:, :, rows], bound["out"]), worst("lse", state.lse[:, :, rows], bound["lse"])
            )


def attention_backward(backend: Backend, case: Case, device: str, *, whole: bool) -> Iterator[float]:
    """Check the gradients of q, k and v."""
    for problem in [] if whole else problems(case):
        of, bound = posed(case, problem, device, gradient=True)
        found = gradients(backend, of.arguments, of.d_out, of.options)
        yield max(worst(name, found[name], bound[name]) for name in ("dq", "dk", "dv"))
    if whole:
        q, k, v = heads(case, device)
        mask = mask_of(case, q, k)
        d_out = torch.randn(
            *q.shape[:3], v.shape[3], generator=torch.Generator(device).manual_seed(9), device=device
        ).to(q.dtype)
        for rows, bound in stretches(case, q, k, v, d_out):
            # A gradient that is zero elsewhere: what these rows send back is all there is.
            sparse = torch.zeros_like(d_out)
            sparse[:, :, rows] = d_out[:, :, rows]
            found = gradients(backend, (q, k, v), sparse, {"mask": mask})
            found["dq"] = found["dq"][:, :, rows]
            yield max(worst(name, found[name], bound[name]) for name in ("dq", "dk", "dv"))


def gradients(backend: Backend, given: tuple[Tensor, ...], d_out: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Differentiate out, on this thread: autograd's own for a GPU knows nothing of the choice that is on trial."""
    leaves = [x.detach().requires_grad_() for x in given]
    with poisoned(), torch.autograd.set_multithreading_enabled(mode=False):
        state = backend.attention(*leaves, **options)
        found = torch.autograd.grad(state.out, leaves, d_out)
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


def problems(case: Case) -> list[Attention]:
    """Small ragged problems, of the heads that are tuned so that they run the very code that is timed."""
    # A step divides the keys where kernels need it; 64, the keys beyond the queries, but for a shift.
    sizes, step, shift = case.problem, int(case.problem.get("step", 1)), int(case.problem.get("shift", 0))
    h, d = int(sizes["h"]), int(sizes["d"])
    g, e = int(sizes.get("g", h)), int(sizes.get("e", d))
    given: dict[str, Any] = {"h": h, "g": g, "d": d, "e": e, "dtype": str(sizes.get("dtype", "bfloat16"))}
    ragged = drawn(case, b=2, m=197, n=-(-(325 + shift) // step) * step, storage="bmhd", seed=1, **given)
    return [ragged, drawn(case, b=1, m=70, n=-(-70 // step) * step, amplitude=3.0, needle=True, storage="bmhd", seed=2,
                          **given)]  # fmt: skip


def drawn(case: Case, *, b: int, m: int, n: int, **given: Any) -> Attention:  # noqa: ANN401 - fields of `Attention`
    """A problem with the mask and the options of a case."""
    words: Any = {name: case.problem[name] for name in OPTIONS if name in case.problem}
    dead = {"dead": float("nan")} if "mask" in case.problem else {}
    return Attention(b=b, m=m, n=n, mask=source(case, b, m, n), **words, **dead, **given)


def source(case: Case, b: int, m: int, n: int) -> str:
    """The mask of a case in the words of `longspan.spec.masks`."""
    usual = "causal()" if case.problem["causal"] else "everything()"
    return str(case.problem.get("mask", usual)).format(b=b, m=m, n=n)


def mask_of(case: Case, q: Tensor, k: Tensor) -> masks.Mask:
    """The mask of a case on its tensors."""
    sizes = q.shape[0], q.shape[2], k.shape[2]
    return Attention(m=sizes[1], n=sizes[2], mask=source(case, *sizes)).build_mask()


def posed(case: Case, problem: Attention, device: str, *, gradient: bool) -> tuple[Inputs, dict[str, Bound]]:
    """Draw a problem and bound its results; all choices of a key meet the same, and winners alone its relatives."""
    return (drawn_once.__wrapped__ if "features" in case.variant else drawn_once)(problem, device, gradient=gradient)


@lru_cache(maxsize=128)
def drawn_once(problem: Attention, device: str, *, gradient: bool) -> tuple[Inputs, dict[str, Bound]]:
    """Draw a problem and bound its results."""
    of = problem.inputs(device)
    return of, attention_bounds(*of.arguments, d_out=of.d_out if gradient else None, **of.options)


def heads(case: Case, device: str) -> list[Tensor]:
    """Draw the tuned problem's q, k and v, on its own device: they are large."""
    sizes = {name: int(value) for name, value in case.problem.items() if isinstance(value, int)}
    b, h, m, d = (sizes[name] for name in ("b", "h", "m", "d"))
    g, n, e = sizes.get("g", h), sizes.get("n", m), sizes.get("e", d)
    draw, dtype = torch.Generator(device).manual_seed(7), getattr(torch, str(case.problem.get("dtype", "bfloat16")))
    shapes = (b, m, h, d), (b, n, g, d), (b, n, g, e)
    return [torch.randn(shape, generator=draw, device=device).to(dtype).transpose(1, 2) for shape in shapes]


def stretches(
    case: Case, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor | None = None
) -> Iterator[tuple[slice, dict[str, Bound]]]:
    """Bound the results of some rows of a long problem: its first, some in the middle, its last."""
    m, n = q.shape[2], k.shape[2]
    seen = bounds(mask_of(case, q, k), q.shape[0], m, n, device=q.device)
    for begin in sorted({0, max(0, m // 2 - 19), max(0, m - STRETCH)}):
        rows = slice(begin, min(m, begin + STRETCH))
        mask = masks.spans(*(x[:, rows].contiguous() for x in (seen.first, seen.last, seen.base)), keep=seen.keep)
        gradient = None if d_out is None else d_out[:, :, rows]
        yield rows, attention_bounds(q[:, :, rows], k, v, d_out=gradient, mask=mask)


def attention_few(backend: Backend, case: Case, device: str, *, whole: bool) -> Iterator[float]:
    """Check out and lse of few queries against many keys."""
    h, g, m, d = (int(case.problem[name]) for name in ("h", "g", "m", "d"))
    given: dict[str, Any] = {"h": h, "g": g, "m": m, "d": d, "e": d, "dtype": "bfloat16", "storage": "bmhd"}
    ragged = drawn(case, b=3, n=1237, needle=True, seed=1, **given)
    short = drawn(case, b=2, n=4 * m + 61, amplitude=3.0, seed=2, **given)
    for problem in () if whole else (ragged, short):
        of, bound = posed(case, problem, device, gradient=False)
        with poisoned():
            state = backend.attention(*of.arguments, **of.options)
        yield max(worst("out", state.out, bound["out"]), worst("lse", state.lse, bound["lse"]))
    if whole:
        q, k, v = heads(case, device)
        with poisoned():
            state = backend.attention(q, k, v, mask=mask_of(case, q, k))
        for one in range(0, q.shape[0], 3):  # a sequence at a time: in float64 all of them are gigabytes
            row = slice(one, one + 1)
            bound = attention_bounds(q[row], k[row], v[row], mask=mask_of(case, q[row], k[row]))
            yield max(worst("out", state.out[row], bound["out"]), worst("lse", state.lse[row], bound["lse"]))


def attention_paged(backend: Backend, case: Case, device: str, *, whole: bool) -> Iterator[float]:
    """Check out and lse of paged caches whose free slots hold NaN; a winner meets longer ones."""
    h, g, m, d, page = (int(case.problem[name]) for name in ("h", "g", "m", "d", "page"))
    # Rows of the table are multiples of sixteen pages, as the tuned ones: Triton compiles the same code for both.
    n = (64 if whole else 16) * page - 15
    seed = PAGES.index(page) + len(PAGES) * (1 + whole)  # by which the law draws pages of a size
    problem = drawn(case, b=7, h=h, g=g, m=m, n=n, d=d, e=d, dtype="bfloat16", index="int32", seed=seed)
    problem = replace(problem, dead=0.0)  # which slots nobody sees, the law knows
    with poisoned():
        yield pages_are_gathered_keys(backend, problem, device)


def rotate_qk(backend: Backend, case: Case, device: str, *, whole: bool) -> Iterator[float]:
    """Check turned queries and keys, far out; numbers of tokens are multiples of sixteen, as the tuned ones."""
    h, g, m, d = (int(case.problem[name]) for name in ("h", "g", "m", "d"))
    if case.problem.get("appended"):
        cached = Attention(h=h, g=g, m=1, n=48, d=d, e=d, dtype="bfloat16", storage="bmhd", seed=1)
        with poisoned():
            yield appending_is_concatenation(backend, cached, device)
        return
    storage = "bmhd" if case.problem["inside"] else "bhmd"
    more: Any = {name: case.problem[name] for name in ("pairing", "rows", "position") if name in case.problem}
    one = Rotate(
        b=1, h=h, g=g, m=208, d=d, planes=d // 2, dtype="bfloat16", largest=2**31, storage=storage, seed=1, **more
    )
    three = replace(one, b=3, m=48, largest=2**20, seed=2)
    for problem in (replace(one, m=min(m, 4096), seed=3),) if whole else (one, three):
        with poisoned():
            yield queries_and_keys_turn_alike(backend, problem, device)


def merge(backend: Backend, case: Case, device: str, *, whole: bool) -> Iterator[float]:
    """Check a merge of parts, some of whose rows saw no key."""
    h, m, e = (int(case.problem[name]) for name in ("h", "m", "e"))
    # Rows are multiples of sixteen where the tuned ones are: Triton compiles the same code for both.
    shape = (1, h, m, e) if whole else (1, 3, 208 if m % 16 == 0 else 67, e)
    draw, states = torch.Generator(device).manual_seed(5), []
    for _ in range(int(case.problem["parts"])):
        out = torch.randn(shape, generator=draw, device=device).to(getattr(torch, str(case.problem["dtype"])))
        lse = 10 * torch.randn(shape[:3], generator=draw, device=device)
        empty = torch.rand(shape[:3], generator=draw, device=device) < 0.25
        states.append(AttentionState(out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)))
    with poisoned():
        state = backend.merge(*states)
    for rows in (slice(0, STRETCH), slice(-STRETCH, None)) if whole else (slice(None),):
        bound = merged_bound([AttentionState(one.out[:, :, rows], one.lse[:, :, rows]) for one in states])
        yield max(worst("out", state.out[:, :, rows], bound["out"]), worst("lse", state.lse[:, :, rows], bound["lse"]))


CHECKS: Final[dict[str, Callable[..., Iterator[float]]]] = {
    "attention": attention, "attention_backward": attention_backward, "attention_few": attention_few,
    "attention_paged": attention_paged, "rotate_qk": rotate_qk, "merge": merge,
}  # fmt: skip
