"""A meaningless call gets one sentence: what was wrong, what is allowed, what it got; the same from every backend."""

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch

from longspan import backends
from longspan.backends import Backend
from longspan.spec import Rotation, bounds, inv_freq, masks, scaling

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
    (lambda of: of.attention(X, K, K, softcap=0.0), "softcap must be a finite number above 0, or None, got 0.0"),
    (lambda of: of.attention(X, K, K, softcap=-1.0), "softcap must be a finite number above 0"),
    (lambda of: of.attention(X, K, K, scale=float("nan")), "scale must be finite, got nan"),
    (lambda of: of.attention(X, K, K, q_offset=ONE), r"q_offset must be an int or an integer tensor \[2\]"),
    (lambda of: of.attention(X, K, K, k_offset=-1), "k_offset must be at least 0, got -1"),
    (lambda of: of.attention(X, K, K, out_dtype=torch.int8), "out_dtype must be one of"),
    (lambda of: of.attention(X, K.to("meta"), K), "q and k must be on one device, got cpu and meta"),
    (lambda of: of.attention_varlen(X[0].mT, K[0], K[0], ONE, torch.tensor([1, 2])), "one number per sequence, got"),
    (lambda of: of.attention_paged(X[0], ONE, K, K, ONE, ONE), r"table must be integers \[1, pages"),
    (lambda of: of.attention_paged(X[0], ONE, K, K[:, :, :3], ONE[None], ONE), "with equal pages, got"),
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
        "must be none, 1 or the batch of 2",
    ),
    (lambda of: of.rotate(X, AT, TURN, pairing="diagonal"), "pairing must be half or interleaved, got 'diagonal'"),
    (lambda of: of.rotate(X, AT.to("meta"), TURN), "x and position must be on one device, got cpu and meta"),
    (lambda of: of.rerotate(X, AT, TURN, scaling.none(6)), "rotations of rerotate must be of equally many planes"),
]


@pytest.mark.parametrize("name", backends.available())
@pytest.mark.parametrize(("call", "message"), ATTENTION + ROTATE, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_a_meaningless_call_is_refused(name: str, call: Callable[[Backend], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(backends.load(name))


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
        (lambda: masks.window(0), "window size must be at least 1, the query's own key, got 0"),
        (lambda: masks.window(1, ahead=-1), "at least 0, got -1 and 0"),
        (lambda: masks.prefix(-1), "prefix length must be at least 0, got -1"),
        (lambda: masks.chunks(0), "chunk size must be at least 1, got 0"),
        (lambda: masks.lengths([3, -1]), r"lengths must be at least 0, got \[3, -1\]"),
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
