"""The Hadamard rotation: orthogonal, the same for queries and keys, and what it is for."""

from collections.abc import Callable
from typing import Final

import pytest
import torch
from einops import einsum
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longspan import spec
from longspan.spec import hadamard, quantise, random_signs

WIDTHS = st.sampled_from([1, 2, 3, 8, 12, 40, 64, 80, 96, 128])


def heads(seed: int, d: int, n: int = 6) -> Tensor:
    """Draw heads."""
    return torch.randn(2, 2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products_stay(turn: Callable[[Tensor, Tensor], Tensor], seed: int, d: int) -> None:
    """Every product q · k is what it was."""
    q, k, signs = heads(seed, d), heads(seed + 1, d), random_signs(d, seed)
    before = einsum(q, k, "b h m d, b h n d -> b h m n")
    after = einsum(turn(q, signs), turn(k, signs), "b h m d, b h n d -> b h m n")
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def an_outlier_is_spread(turn: Callable[[Tensor, Tensor], Tensor], seed: int, d: int) -> None:
    """One large coordinate becomes 2^a equal ones."""
    part = d & -d
    x = torch.zeros(1, 1, 1, d, dtype=torch.float64)
    x[..., seed % d] = 3.0
    spread = turn(x, random_signs(d, seed)).abs().flatten()
    assert int((spread > 0).sum()) == part, "not every coordinate of a part takes its share"
    torch.testing.assert_close(spread[spread > 0], torch.full((part,), 3 / part**0.5, dtype=torch.float64))


def signs_come_first(turn: Callable[[Tensor, Tensor], Tensor], seed: int, d: int) -> None:
    """The signs turn what they are given, before the matrix: x · diag(signs) · H."""
    signs = random_signs(d, seed)
    x = heads(seed, d)
    torch.testing.assert_close(turn(x, signs), turn(x * signs, torch.ones_like(signs)))
    first = torch.zeros(1, 1, 1, d, dtype=torch.float64)
    first[..., 0] = 1.0
    row = turn(first, torch.ones_like(signs)).flatten()[: d & -d]
    torch.testing.assert_close(row, torch.full_like(row, (d & -d) ** -0.5))


LAWS: Final = (products_stay, an_outlier_is_spread, signs_come_first)


@pytest.mark.parametrize("law", LAWS)
@given(seed=st.integers(0, 1000), d=WIDTHS)
def test_the_rotation_obeys(law: Callable[..., None], seed: int, d: int) -> None:
    law(hadamard, seed, d)


def not_made_orthogonal(x: Tensor, signs: Tensor) -> Tensor:
    """Leave the root of the order out."""
    return hadamard(x, signs) * (x.shape[3] & -x.shape[3]) ** 0.5


def without_signs(x: Tensor, signs: Tensor) -> Tensor:
    """Ignore the signs."""
    return hadamard(x, torch.ones_like(signs))


def signs_last(x: Tensor, signs: Tensor) -> Tensor:
    """Multiply by signs after the matrix."""
    return without_signs(x, signs) * signs


def pairs_only(x: Tensor, signs: Tensor) -> Tensor:
    """Mix neighbours, and no further."""
    x = (x * signs).unflatten(3, (-1, 2)) if x.shape[3] % 2 == 0 else (x * signs)[..., None]
    return (torch.stack([x.sum(-1), x[..., 0] - x[..., -1]], -1) * 0.5**0.5).flatten(3)


def other_signs_each_time(x: Tensor, signs: Tensor) -> Tensor:
    """Let queries and keys have signs of their own."""
    return hadamard(x, signs * random_signs(x.shape[3], int(x.sum() * 1e6) % 2**30))


@pytest.mark.parametrize(
    "mutant", [not_made_orthogonal, without_signs, signs_last, pairs_only, other_signs_each_time]
)  # fmt: skip
def test_a_planted_bug_breaks_a_law(mutant: Callable[[Tensor, Tensor], Tensor]) -> None:
    broken = set()
    for law in LAWS:
        try:
            law(mutant, 5, 64)
        except AssertionError:
            broken.add(law.__name__)
    assert broken


def test_signs_are_of_either_kind_and_the_same_everywhere() -> None:
    signs = random_signs(4096, 7)
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(float(signs.mean())) < 4 / 64
    assert torch.equal(random_signs(128, 7), signs[:128])
    assert not torch.equal(random_signs(128, 8), signs[:128])


def split_mix(i: int, seed: int) -> int:
    """The highest bit of the i-th number of SplitMix64, in whole numbers of any size."""
    mask = 2**64 - 1
    state = (i + (seed << 32)) * 0x9E3779B97F4A7C15 & mask
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return (state ^ state >> 31) >> 63


@given(seed=st.integers(0, 2**31 - 1))
def test_signs_are_bits_of_split_mix(seed: int) -> None:
    assert random_signs(40, seed).tolist() == [1 - 2 * split_mix(i, seed) for i in range(1, 41)]


def table_3(seed: int, n: int, d: int) -> list[Tensor]:
    """Draw q, k and v with rare outliers: N(0, 1) + N(0, 100) · Bernoulli(0.001) (FlashAttention-3, §4.3)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(3):
        x, large = (torch.randn(1, 1, n, d, generator=generator, dtype=torch.float64) for _ in range(2))
        rare = torch.rand(1, 1, n, d, generator=generator, dtype=torch.float64) < 0.001
        drawn.append(x + 10 * large * rare)
    return drawn


def test_turning_makes_room_where_outliers_are_rare() -> None:
    for seed in range(3):
        q, k, v = table_3(seed, 1024, 128)
        truth, signs = spec.attention(q, k, v).out, random_signs(128, seed)

        def error(q: Tensor, k: Tensor, truth: Tensor = truth, v: Tensor = v) -> float:
            heads = [quantise(q), quantise(k), quantise(v)]
            return float((spec.attention_quantised(*heads, out_dtype=torch.float64).out - truth).square().mean().sqrt())

        assert error(hadamard(q, signs), hadamard(k, signs)) < 0.8 * error(q, k)
