"""The backend of PyTorch's kernels: what its plans cover, what its calls allocate, and what it declines.

That it obeys every law is tested with the other backends (test_conformance.py).
"""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan import spec
from longspan.backends import OPERATIONS, Unsupported, sdpa
from longspan.backends.sdpa import kernels
from longspan.backends.sdpa.tiles import tiles
from longspan.laws.problems import Attention
from longspan.laws.strategies import attentions
from longspan.spec import Bounds, bounds, masks, visible
from longspan.spec.masks import Mask

LONG = 32768
LONG_MASKS = {
    "causal": masks.causal(),
    "bottom-right with lengths": masks.causal() & masks.lengths([30_001]),
    "window": masks.window(1024),
    "window with a head": masks.window(500, keep_first=4),
    "documents": masks.causal() & masks.documents([20_000, 1, 700, 12_000]),
    "many documents": masks.documents([100] * 300),
    "chunks": masks.causal() & masks.chunks(3000),
    "prefix": masks.prefix(10_000) & masks.window(900, ahead=5),
}


class Recorder(TorchDispatchMode):
    """Count the operators that run, and remember the most elements that one of their results occupies."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.calls = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        result = func(*args, **(kwargs or {}))
        self.calls[func.__name__.split(".")[0]] += 1
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def drawn(m: int, n: int, *, d: int = 8, h: int = 1, g: int = 1, grad: bool = False) -> list[Tensor]:
    """Draw q, k and v."""
    draw = torch.Generator().manual_seed(m + n)
    shapes = ((h, m), (g, n), (g, n))
    return [torch.randn(1, heads, size, d, generator=draw).requires_grad_(grad) for heads, size in shapes]


def kernel_calls(mask: Mask, m: int, n: int) -> int:
    """Count the kernels that one call of attention runs."""
    with Recorder() as recorder:
        _ = sdpa.attention(*drawn(m, n), mask=mask)
    return recorder.calls["_scaled_dot_product_flash_attention_for_cpu"]


@given(attentions(b=1), st.integers(1, 8), st.integers(0, 24))
def test_plans_show_every_row_exactly_what_its_mask_shows(problem: Attention, fewest: int, more: int) -> None:
    options = problem.inputs().options
    seen = bounds(options["mask"], 1, problem.m, problem.n, q_offset=options["q_offset"], k_offset=options["k_offset"])
    shown, row = torch.zeros(problem.m, problem.n, dtype=torch.int64), 0
    for tile in tiles(seen, (fewest, fewest + more)) if problem.m and problem.n else []:
        assert row <= tile.start < tile.stop, "tiles overlap or are empty"
        row = tile.stop
        for part in tile.parts:
            here = shown[tile.start : tile.stop, part.start : part.stop]
            assert here.numel(), "a part is empty"
            match part.kind:
                case "full":
                    here += 1
                case "causal":
                    assert here.shape[0] == here.shape[1], "top-left and bottom-right differ unless it is a square"
                    here += torch.ones_like(here).tril()
                case "cut":
                    here += visible(seen, problem.n)[0, tile.start : tile.stop, part.start : part.stop]
    assert torch.equal(shown, visible(seen, problem.n)[0].long())


@pytest.mark.parametrize("name", LONG_MASKS)
def test_long_masks_are_planned_with_little_waste(name: str) -> None:
    seen = bounds(LONG_MASKS[name], 1, LONG, LONG)
    scores = cut = 0
    for tile in tiles(seen, kernels.DEVICES["cpu"].rows):
        for part in tile.parts:
            size = (tile.stop - tile.start) * (part.stop - part.start)
            scores += size // (2 if part.kind == "causal" else 1)
            cut = max(cut, size if part.kind == "cut" else 0)
    head = LONG * seen.keep
    assert scores <= 3 * (int((seen.last - seen.first).clamp(min=0).sum()) + head)
    assert cut <= 16 * LONG, "a mask of one part is far larger than the sequence"


@pytest.mark.parametrize("name", LONG_MASKS)
def test_long_sequences_allocate_in_proportion_to_their_length(name: str) -> None:
    q, k, v = drawn(LONG, LONG)
    with Recorder() as recorder:
        state = sdpa.attention(q, k, v, mask=LONG_MASKS[name])
    assert recorder.largest <= 16 * LONG
    rows = torch.tensor([0, 1, 777, 15_000, 20_000, 25_600, 29_999, LONG - 1])
    seen = bounds(LONG_MASKS[name], 1, LONG, LONG)
    first, last, base = (x[:, rows] for x in (seen.first, seen.last, seen.base))
    spans = masks.spans(first, last, base, seen.keep)
    truth = spec.attention(q[:, :, rows].double(), k.double(), v.double(), mask=spans)
    torch.testing.assert_close(state.out[:, :, rows], truth.out.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(state.lse[:, :, rows], truth.lse.float(), atol=1e-5, rtol=0)


def test_long_gradients_allocate_in_proportion_to_the_length() -> None:
    q, k, v = drawn(LONG, LONG, grad=True)
    with Recorder() as recorder:
        state = sdpa.attention(q, k, v, mask=masks.causal() & masks.window(256))
        (state.out.sum() + state.lse.exp().clamp(max=1.0).sum()).backward()
    assert recorder.calls["_scaled_dot_product_flash_attention_for_cpu_backward"] > 0
    assert recorder.largest <= 16 * LONG


def test_what_one_kernel_can_do_is_one_call() -> None:
    assert kernel_calls(masks.causal(), 300, 300) == 1
    assert kernel_calls(masks.everything(), 300, 700) == 1
    assert kernel_calls(masks.causal(), 1, 700) == 1, "decoding"
    assert kernel_calls(masks.causal() & masks.lengths([500]), 300, 700) == 2, "a rectangle and a square"
    assert kernel_calls(masks.causal() & masks.documents([300, 400]), 700, 700) == 2, "one for each document"
    assert kernel_calls(masks.lengths([0]), 300, 300) == 0, "nothing is seen"


def test_sequences_that_see_alike_share_their_calls() -> None:
    q, k, v = (torch.randn(4, 1, 200, 8) for _ in range(3))
    with Recorder() as recorder:
        _ = sdpa.attention(q, k, v, mask=masks.lengths([150, 150, 90, 90]))
    assert recorder.calls["_scaled_dot_product_flash_attention_for_cpu"] == 2


def reasons(operation: str, *args: Any, **kwargs: Any) -> tuple[str | None, str | None]:
    """Pair what `declines` says with what the call raises."""
    try:
        _ = getattr(sdpa, operation)(*args, **kwargs)
    except Unsupported as refusal:
        return sdpa.declines(operation, *args, **kwargs), refusal.reason
    return sdpa.declines(operation, *args, **kwargs), None


@given(attentions(), st.booleans())
def test_declines_says_exactly_what_a_call_raises(problem: Attention, deterministic: bool) -> None:
    of = problem.inputs()
    said, raised = reasons("attention", *of.arguments, **of.options, deterministic=deterministic)
    assert said == raised
    assert (raised is None) == (problem.softcap is None and problem.alibi is None)


@given(attentions(mask="causal()", q_offset=None, k_offset=0, b=1, m=5, n=7), st.booleans())
def test_ragged_and_paged_calls_decline_alike(problem: Attention, paged: bool) -> None:
    of = problem.inputs()
    options = {name: x for name, x in of.options.items() if name not in {"q_offset", "k_offset"}}
    q, k, v = (x[0].transpose(0, 1) for x in of.arguments)
    if paged:
        one = torch.zeros(1, 1, dtype=torch.int32)
        said, raised = reasons("attention_paged", q, torch.tensor([5]), of.k, of.v, one, torch.tensor([7]), **options)
    else:
        said, raised = reasons("attention_varlen", q, k, v, torch.tensor([5]), torch.tensor([7]), **options)
    assert said == raised
    assert (raised is None) == (problem.softcap is None and problem.alibi is None)


def test_declines_runs_nothing() -> None:
    arguments = drawn(3, 3)
    with Recorder() as recorder:
        for operation in OPERATIONS:
            assert sdpa.declines(operation, *arguments, deterministic=True) is None
    assert not recorder.calls


def test_declines_names_the_operations_it_knows() -> None:
    with pytest.raises(ValueError, match=r"rotate.*got 'divide'"):
        _ = sdpa.declines("divide")


def test_other_devices_are_declined_by_name() -> None:
    q = torch.empty(1, 1, 4, 8, device="meta")
    assert sdpa.declines("attention", q, q, q) is not None
    with pytest.raises(Unsupported, match="on meta, only on cpu and cuda"):
        _ = sdpa.attention(q, q, q)


@pytest.mark.parametrize(
    "changed",
    [
        {"q": torch.zeros(1, 3, 4, 8)}, {"v": torch.zeros(1, 2, 4, 8).half()}, {"scale": float("nan")},
        {"softcap": -1.0}, {"mask": masks.lengths([1, 2])},
        {"mask": masks.documents([4]), "q_offset": 2}, {"k_offset": -1}, {"out_dtype": torch.int32},
    ],
    ids=" ".join,
)  # fmt: skip
def test_meaningless_problems_get_the_specifications_own_words(changed: dict[str, Any]) -> None:
    options = {**dict(zip("qkv", (torch.zeros(1, 2, 4, 8),) * 3, strict=True)), **changed}
    with pytest.raises(ValueError, match="must be") as expected:
        _ = spec.attention(**options)
    with pytest.raises(ValueError, match="must be") as found:
        _ = sdpa.attention(**options)
    assert str(found.value) == str(expected.value)


def test_storage_without_a_unit_stride_is_read_right() -> None:
    q, k, v = (torch.randn(2, 3, 8, 21).transpose(2, 3) for _ in range(3))
    state, truth = sdpa.attention(q, k, v), spec.attention(q, k, v)
    torch.testing.assert_close(state.out, truth.out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("d", [1, 7, 300])
def test_any_head_dim_is_served(d: int) -> None:
    q, k, v = (torch.randn(1, 2, 9, size, dtype=torch.float64, requires_grad=True) for size in (d, d, 5))
    results = []
    for backend in (sdpa, spec):
        state = backend.attention(q, k, v, mask=masks.causal())
        results.append((state.out, *torch.autograd.grad(state.out.square().sum() + state.lse.sum(), (q, k, v))))
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, atol=1e-10, rtol=0)


def test_second_derivatives_are_refused() -> None:
    q, k, v = drawn(5, 5, grad=True)
    (d_q,) = torch.autograd.grad(sdpa.attention(q, k, v).out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_q.sum().backward()


def test_appending_touches_only_the_slots_named() -> None:
    caches = (torch.zeros(64, 2, 256, 8), torch.zeros(64, 2, 256, 8))
    k, v = torch.ones(3, 2, 8), 2 * torch.ones(3, 2, 8)
    with Recorder() as recorder:
        sdpa.append_(k, v, *caches, torch.tensor([0, -1, 257]))
    assert recorder.largest <= caches[0].numel(), "nothing larger than the cache itself, which is written through views"
    assert recorder.calls["clone"] == recorder.calls["copy_"] == 0
    for cache, value in zip(caches, (1, 2), strict=True):
        expected = torch.zeros_like(cache)
        expected[0, :, 0] = expected[1, :, 1] = value
        assert torch.equal(cache, expected)


def test_appending_outside_the_cache_is_an_index_error() -> None:
    k, cache = torch.ones(1, 2, 8), torch.zeros(2, 2, 4, 8)
    with pytest.raises(IndexError):
        sdpa.append_(k, k, cache, cache.clone(), torch.tensor([8]))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("family", ["flash", "efficient"])
def test_cuda_operators_take_what_they_are_given(family: str, masked: bool) -> None:
    q, k = (torch.empty(2, heads, size, 64, dtype=torch.bfloat16, device="meta") for heads, size in ((4, 37), (2, 53)))
    bias = torch.empty(37, 53, dtype=q.dtype, device="meta") if masked and family == "efficient" else None
    forward, backward = (getattr(kernels, f"{family}_{way}") for way in ("forward", "backward"))
    causal, scale = False, 1.0
    out, lse = forward(q, k, k, bias, causal, scale)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert [x.shape for x in backward(out, q, k, k, bias, out, lse, causal, scale)] == [q.shape, k.shape, k.shape]


def test_a_bias_starts_its_rows_at_multiples_of_sixteen() -> None:
    q, bias = torch.empty(2, 3, 5, 8), torch.randn(5, 53)
    laid = kernels.aligned(bias, q)
    assert laid is not None
    assert laid.stride() == (0, 0, 64, 1)
    assert torch.equal(laid[1, 2], bias)


def test_plans_of_no_rows_are_empty() -> None:
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    assert tiles(Bounds(nothing, nothing, nothing, 0, nothing), (4, 8)) == []


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms_go_through() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 4, 9, 8, dtype=torch.float64, generator=draw) for _ in range(3))
    sink = torch.randn(3, 4, dtype=torch.float64, generator=draw)

    def loss(of: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
            state = of.attention(q, k, v, sink=sink, mask=masks.causal() & masks.window(4))
            return state.out.square().sum() + state.lse.sin().sum()

        return run

    for transform in (torch.vmap, lambda f: torch.vmap(torch.func.grad(f, argnums=(0, 1, 2, 3)))):
        found, truth = (transform(loss(of))(q, k, v, sink) for of in (sdpa, spec))
        torch.testing.assert_close(found, truth, atol=1e-12, rtol=1e-12)
