"""A meaningless call gets one sentence: what was wrong, what is allowed, what it got; the same from every backend."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from longspan import backends
from longspan.backends import Backend
from longspan.spec import AttentionState, Rotation, bounds, inv_freq, masks, scaling

X = torch.randn(2, 4, 6, 8)
K = torch.randn(2, 2, 9, 8)
AT = torch.arange(6)
TURN = scaling.none(8)
ONE = torch.tensor([1])


@pytest.fixture(autouse=True)
def shapes_unchecked() -> Iterator[None]:
    """Switch off the shape checks that tests add, so that the library's own are heard."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


ATTENTION: list[tuple[Callable[[Backend], Any], str]] = [
    (lambda of: of.attention(X[0], K, K), r"q must be a floating tensor \[batch, heads, tokens, head_dim\], got"),
    (lambda of: of.attention(X.int(), K, K), "q must be a floating tensor"),
    (lambda of: of.attention(X, K.double(), K), "q, k and v must be of one dtype, got torch.float32, torch.float64"),
    (lambda of: of.attention(X[:1], K, K), "batch of q, k and v must be equal, got 1, 2 and 2"),
    (
        lambda of: of.attention(X, K, K[:, :, :5]),
        r"heads and tokens of k and v must be equal, got \[2, 9\] and \[2, 5\]",
    ),
    (lambda of: of.attention(X[..., :7], K, K), "head_dim of q and k must be equal, got 7 and 8"),
    (lambda of: of.attention(X[:, :3], K, K), "q heads must be a multiple of k heads"),
    (lambda of: of.attention(X, K, K, sink=torch.zeros(3)), r"sink must be one floating number per head, \[4\], got"),
    (lambda of: of.attention(X, K, K, alibi=torch.zeros(4).int()), r"alibi must be one floating number per head"),
    (
        lambda of: of.attention(X, K, K, softcap=0.0),
        "softcap must be a finite number above 0, or None, and no tensor or array, got 0.0",
    ),
    (lambda of: of.attention(X, K, K, softcap=-1.0), "softcap must be a finite number above 0"),
    (
        lambda of: of.attention(X, K, K, scale=float("nan")),
        "scale must be a finite number, and no tensor or array, got nan",
    ),
    (lambda of: of.attention(X, K, K, q_offset=ONE), r"q_offset must be an int or an integer tensor \[2\]"),
    (lambda of: of.attention(X, K, K, k_offset=-1), "k_offset must be a whole number of at least 0"),
    (lambda of: of.attention(X, K, K, out_dtype=torch.int8), "out_dtype must be one of"),
    (lambda of: of.attention(X, K.to("meta"), K), "q and k must be on one device, got cpu and meta"),
    (lambda of: of.attention_varlen(X[0].mT, K[0], K[0], ONE, torch.tensor([1, 2])), "one number per sequence, got"),
    (lambda of: of.attention_paged(X[0], ONE, K, K, ONE, ONE), r"table must be integers \[1, pages"),
    (lambda of: of.attention_paged(X[0], ONE, K, K[:, :, :3], ONE[None], ONE), "with equal pages, got"),
    (lambda of: of.attention(X, K, K, mask=torch.ones(6, 9).bool()), "mask must be made by longspan.spec.masks"),
    (lambda of: of.attention(X, K, K, mask=masks.causal), "masks.causal.. for one, got function"),
    (lambda of: of.attention(X, K, K, mask=None), "mask must be made by longspan.spec.masks"),
    (lambda of: of.attention(None, K, K), "q must be a tensor, got NoneType"),
    (lambda of: of.attention(X, K, K, sink=0.0), "sink must be a tensor, got float"),
    (lambda of: of.attention(X, K, K, q_offset=1.5), "q_offset must be a whole number"),
    (lambda of: of.attention(X, K, K, q_offset=2**63), "q_offset must be a whole number"),
    (lambda of: of.attention(X, K, K, scale=torch.tensor(1.0)), "scale must be a finite number, and no tensor"),
    (
        lambda of: of.attention(X, K, K, scale=np.array(0.5)),
        r"scale must be a finite number, and no tensor or array, got array\(0.5\)",
    ),
    (lambda of: of.attention(X, K, K, scale="0.5"), "scale must be a finite number, and no tensor or array, got '0.5'"),
    (lambda of: of.attention(X, K, K, scale=0.5j), "scale must be a finite number"),
    (
        lambda of: of.attention(X, K, K, softcap=np.array(5.0)),
        r"softcap must be a finite number .*, and no tensor or array, got array\(5.\)",
    ),
    (lambda of: of.attention(X, K, K, softcap=1e39), "softcap must be a finite number above 0"),
    (lambda of: of.attention(X, K, K, softcap=torch.tensor(1.0)), "softcap must be a finite number .*, and no tensor"),
    (lambda of: of.attention_varlen(X, K, K, ONE, ONE), r"q must be \[tokens, heads, head_dim\]"),
    (lambda of: of.attention_paged(X, ONE, K, K, ONE[None], ONE), r"q must be \[tokens, heads, head_dim\]"),
    (lambda of: of.merge(X, X), "a state must be AttentionState"),
    (
        lambda of: of.add_sink(AttentionState(X[0], X[0, ..., 0]), torch.zeros(4)),
        "out of a state must be",
    ),
    (lambda of: of.merge(), "merge must be given at least one state, got none"),
]

ROTATE: list[tuple[Callable[[Backend], Any], str]] = [
    (lambda of: of.rotate(X[0], AT, TURN), r"x must be a floating tensor \[b, h, m, d\]"),
    (lambda of: of.rotate(X, AT.float(), TURN), "position must be int32 or int64, got torch.float32"),
    (lambda of: of.rotate(X, AT[:5], TURN), r"position must be \[6\], \[2, 6\] or \[axes, 2, 6\]"),
    (lambda of: of.rotate(X, AT, scaling.none(10)), "planes of a rotation must be at most d / 2 = 4 for d = 8, got 5"),
    (lambda of: of.rotate(X[..., :7], AT, TURN), "at most d / 2 = 3 for d = 7, got 4"),
    (
        lambda of: of.rotate(X, AT, Rotation(inv_freq(8).expand(3, 4))),
        r"inv_freq must be float64 \[planes\], \[1, planes\] or \[2, planes\]",
    ),
    (lambda of: of.rotate(X, AT, TURN, pairing="diagonal"), "pairing must be half or interleaved, got 'diagonal'"),
    (lambda of: of.rotate(X, AT.to("meta"), TURN), "x and position must be on one device, got cpu and meta"),
    (lambda of: of.rotate(X, [0] * 6, TURN), "position must be a tensor, got list"),
    (lambda of: of.rotate(X, AT, replace(TURN, inv_freq=TURN.inv_freq.float())), "inv_freq must be float64"),
    (lambda of: of.rotate(X, AT, replace(TURN, axis=AT[:2])), r"axis must be int64, one number per plane, \[4\]"),
    (lambda of: of.rotate(X, AT, replace(TURN, attention_factor=torch.ones(3).double())), "attention_factor must be"),
    (lambda of: of.rerotate(X, AT, replace(TURN, attention_factor=0.0), TURN), "old rotation must be other than 0"),
    (lambda of: of.rerotate(X, AT, TURN, scaling.none(6)), "rotations of rerotate must be of equally many planes"),
]


MEANINGLESS = ATTENTION + ROTATE
NAMES = [f"{i} {message[:24]}" for i, (_, message) in enumerate(MEANINGLESS)]


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize(("call", "message"), MEANINGLESS, ids=NAMES)
def test_a_meaningless_call_is_refused(name: str, call: Callable[[Backend], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(backends.load(name))


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("name", backends.available())
def test_a_scalar_of_numpy_is_a_number(name: str, number: Callable[[float], Any]) -> None:
    backend = backends.load(name)
    options = {"scale": 0.25} | ({} if name == "sdpa" else {"softcap": 2.0})  # which PyTorch's kernels lack
    for _ in range(2):  # the second time, a backend may remember the first
        found = backend.attention(X, K, K, **{of: number(value) for of, value in options.items()})
        expected = backend.attention(X, K, K, **options)
        assert torch.equal(found.out, expected.out)
        assert torch.equal(found.lse, expected.lse)


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*eager.*, got 'cuda'"):
        backends.load("cuda")


def append(**changed: Any) -> Callable[[Backend], Any]:
    """Append two tokens to a small cache, one argument changed."""
    good = {
        "k": torch.randn(2, 2, 8), "v": torch.randn(2, 2, 8), "k_cache": torch.zeros(3, 2, 4, 8),
        "v_cache": torch.zeros(3, 2, 4, 8), "slot": torch.tensor([0, 5]),
    }  # fmt: skip
    return lambda of: of.append_(**{**good, **changed})


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            append(k=torch.randn(2, 3, 8)),
            r"k and k_cache must be \[tokens, heads, dim\] and",
        ),
        (
            append(v=torch.randn(2, 2, 8).half()),
            "v and v_cache must be of one dtype, got torch.float16",
        ),
        (append(slot=torch.tensor([0])), r"slot must be one integer per token, \[2\]"),
        (append(rotation=TURN), "position and rotation must be given together or not at all"),
    ],
    ids=["heads", "dtype", "slots", "positions"],
)
def test_a_meaningless_append_is_refused(name: str, call: Callable[[Backend], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(backends.load(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: masks.window(0),
            "own key included, must be a whole number of at least 1 and below 2.31, got 0",
        ),
        (lambda: masks.window(1, ahead=-1), "window ahead must be a whole number of at least 0"),
        (lambda: masks.prefix(-1), "prefix length must be a whole number of at least 0"),
        (lambda: masks.chunks(0), "chunk size must be a whole number of at least 1"),
        (lambda: masks.lengths([3, -1]), "lengths must be a whole number of at least 0 and below 2.31, got -1"),
        (lambda: masks.lengths(torch.tensor([1.0])), "lengths must be int32 or int64, got torch.float32"),
        (lambda: masks.documents([1, 2], [3]), r"got \[2\] and \[1\]"),
        (lambda: masks.spans(torch.tensor([0]), torch.tensor([1, 2])), r"all \[m\] or all \[b, m\]"),
        (lambda: masks.spans(torch.tensor([0]), torch.tensor([1]), keep=2), "0 where there is no base"),
        (lambda: bounds(masks.lengths([1, 2]), 3, 4, 5), r"lengths must be \[3\], one per sequence, got \[2\]"),
        (lambda: bounds(masks.documents([1]), 1, 4, 5, q_offset=2), "q_offset must be None beside documents"),
        (lambda: bounds(masks.spans(torch.tensor([0]), torch.tensor([1])), 1, 4, 5), r"spans must be \[4\]"),
    ],
    ids=[
        "window",
        "ahead",
        "prefix",
        "chunks",
        "lengths",
        "float lengths",
        "documents",
        "spans",
        "keep",
        "batch",
        "placed documents",
        "rows",
    ],
)
def test_meaningless_masks_are_refused_in_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        ([[0, 1], [2, 3]], [12, 8], "lengths must be 0 to 8, what 2 pages of 4 hold"),
        ([[0, 1], [2, 3]], [-1, 8], "lengths must be 0 to 8"),
        ([[0, 9], [2, 3]], [8, 8], "table must be 0 to 4, the pages of the pool"),
        ([[0, -1], [2, 3]], [8, 8], "table must be 0 to 4, the pages of the pool"),
    ],
    ids=["long", "negative", "beyond", "below"],
)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_table_that_does_not_hold_its_lengths_is_refused(
    name: str, table: list[list[int]], lengths: list[int], message: str
) -> None:
    pool, q, count = torch.randn(5, 2, 4, 8), torch.randn(2, 2, 8), torch.tensor([1, 1])
    with pytest.raises(ValueError, match=message):
        backends.load(name).attention_paged(q, count, pool, pool, torch.tensor(table), torch.tensor(lengths))
