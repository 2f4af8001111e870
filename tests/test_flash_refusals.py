"""What flash refuses as the specification does, before any launch, and what it tells autograd of."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import spec
from longspan.backends import Unsupported, flash
from longspan.spec import AttentionState, masks

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def heads(*shape: int, seed: int = 0) -> Tensor:
    """Draw heads."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    "mask",
    [
        masks.lengths([5]) & masks.window(3),
        masks.lengths([5, 6, 7]) & masks.window(3),
        masks.lengths([5]),
        masks.documents(torch.tensor([[3, 4]]), torch.tensor([[3, 4]])) & masks.causal(),
        masks.spans(torch.zeros(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)),
    ],
    ids=["one length and a window", "three lengths", "one length", "documents of one", "spans of three"],
)
def test_a_mask_of_another_batch_is_refused_in_the_words_of_the_specification(mask: Any) -> None:
    q = heads(2, 2, 7, 16)
    with pytest.raises(ValueError) as expected:  # noqa: PT011 - whatever the specification says
        spec.bounds(mask, 2, 7, 7)
    for ask in (flash.attention, lambda *given, **options: flash.declines("attention", *given, **options)):
        with pytest.raises(ValueError) as found:  # noqa: PT011
            ask(q, q, q, mask=mask)
        assert str(found.value) == str(expected.value)


def test_distances_beyond_int32_are_refused_where_a_penalty_measures_them() -> None:
    q, slopes = heads(1, 2, 3, 16), torch.full((2,), 1e-6, device=DEVICE)
    assert flash.declines("attention", q, q, q, q_offset=2**31 - 10) is None
    with pytest.raises(Unsupported, match="ALiBi"):
        flash.attention(q, q, q, q_offset=2**31 - 10, alibi=slopes)


def test_wide_heads_have_no_gradient_of_a_sink_either() -> None:
    q, k, v = heads(1, 2, 1, 320), heads(1, 1, 40, 320), heads(1, 1, 40, 320)
    sink = torch.zeros(2, device=DEVICE, requires_grad=True)
    assert flash.declines("attention", q, k, v, sink=sink.detach()) is None
    with pytest.raises(Unsupported, match="head dimensions"):
        flash.attention(q, k, v, sink=sink)


def test_autograd_notices_what_is_overwritten() -> None:
    weight = torch.ones((), device=DEVICE, requires_grad=True)
    x, position = heads(1, 2, 5, 16), torch.arange(5, device=DEVICE)
    rotation = spec.Rotation(spec.inv_freq(16)).to(DEVICE)
    scaled = weight * x  # its gradient needs x as it was
    flash.rotate_(x, position, rotation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scaled.sum().backward()


def test_a_cache_that_is_written_to_is_no_longer_differentiated_through() -> None:
    q = heads(1, 2, 3, 16).requires_grad_()
    k, v = heads(1, 2, 8, 16, seed=1), heads(1, 2, 8, 16, seed=2)
    state = flash.attention(q, k, v)
    flash.append_(heads(1, 2, 16), heads(1, 2, 16), k, v, torch.tensor([3], device=DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state.out.sum().backward()


def test_states_of_ragged_batches_merge() -> None:
    parts = [AttentionState(heads(5, 2, 16, seed=seed), heads(5, 2, seed=seed + 9)) for seed in range(3)]
    found, expected = flash.merge(*parts), spec.merge(*parts)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)


def test_lengths_of_queries_may_lie_on_the_host_every_time() -> None:
    pages = heads(4, 1, 16, 16)
    given = (heads(2, 1, 16), torch.tensor([1, 1]), pages, pages)
    rest = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([[2, 0], [1, 3]], [20, 30])]
    states = [flash.attention_paged(*given, *rest) for _ in range(4)]
    truth = spec.attention_paged(*given, *rest)
    for state in states:
        torch.testing.assert_close(state.out, truth.out, rtol=1e-4, atol=1e-4)


# In a process of its own, since no compiler looks through the checks of shapes that this suite adds to the spec.
COMPILED = """
import torch
from longspan.backends import Unsupported, flash
device = "cuda" if torch.cuda.is_available() else "cpu"
draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
q, slopes, pages = draw(1, 2, 9, 16), torch.ones(2, device=device), draw(3, 2, 16, 16)
table, lengths = torch.tensor([[0, 2]], dtype=torch.int32, device=device), torch.tensor([20], device=device)
def penalised(slopes): return flash.attention(q, q, q, alibi=slopes).out.sum()
def paged(x): return flash.attention_paged(x, torch.tensor([4], device=device), pages, pages, table, lengths).out.sum()
for function, given in ((penalised, slopes), (paged, draw(4, 2, 16))):
    try:
        found = torch.compile(torch.func.grad(function), fullgraph=True, backend="aot_eager")(given)
    except Exception as error:
        print("refused", "raise Unsupported" in str(error))  # dynamo quotes the line
    else:
        print("silent", found.abs().max())
"""


def test_a_compiled_functional_gradient_that_is_not_there_is_refused() -> None:
    child = subprocess.run(  # noqa: S603 - our own source
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.stdout.split("\n")[:2] == ["refused True"] * 2, child.stdout + child.stderr[-3000:]
