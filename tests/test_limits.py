"""README's limits of the kernels, one by one: what is inside is served, and what is beyond is declined by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import spec
from longspan.backends import flash
from longspan.spec import AttentionState, masks

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def heads(m: int, d: int, h: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make heads without giving them memory: nothing here is launched."""
    return torch.zeros(d, dtype=dtype, device=DEVICE).expand(1, h, m, d)


def attends(m: int, n: int, d: int, e: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> str | None:
    """Ask about attention."""
    return flash.declines("attention", heads(m, d, dtype=dtype), *(heads(n, x, dtype=dtype) for x in (d, e)), **options)


def test_attention_serves_head_dims_in_steps_of_8_up_to_256_and_wider_ones_of_few_queries() -> None:
    for d, e in ((8, 8), (256, 256), (192, 128), (40, 256)):
        assert attends(300, 600, d, e) is None
    assert "steps of 8 up to 256" in str(attends(300, 600, 264, 128))
    assert "steps of 8 up to 256" in str(attends(300, 600, 12, 16))
    assert attends(32, 600, 1024, 512) is None
    for m, d, e in ((33, 1024, 512), (32, 1032, 512), (32, 1024, 520)):
        assert "steps of 8" in str(attends(m, 600, d, e))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_attention(dtype: torch.dtype) -> None:
    assert attends(3, 5, 64, 64, dtype) is None
    assert "float64" in str(attends(3, 5, 64, 64, torch.float64))


def test_attention_counts_tokens_below_two_to_the_thirty() -> None:
    longest = 2**30 - 1
    assert attends(300, longest, 64, 64) is None
    assert str(longest) in str(attends(300, longest + 1, 64, 64))


def paged(d: int, e: int, page: int, mask: Any) -> str | None:
    """Ask about paged attention."""
    pools = (torch.zeros(3, 2, page, x, device=DEVICE) for x in (d, e))
    lengths = torch.tensor([page], device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    return flash.declines(
        "attention_paged", torch.zeros(1, 2, d, device=DEVICE), lengths * 0 + 1, *pools, table, lengths, mask=mask
    )


def test_paged_attention_serves_pages_of_any_size_and_two_terms_of_chunks() -> None:
    for page in (1, 16, 24, 64, 256):
        assert paged(1024, 512, page, masks.chunks(5) & masks.chunks(7)) is None
    assert "two terms of chunks" in str(paged(64, 64, 16, masks.chunks(5) & masks.chunks(7) & masks.chunks(9)))
    for d, e in ((1032, 512), (1024, 520), (12, 16)):
        assert "up to 1024, values 512" in str(paged(d, e, 16, masks.causal()))


def test_paged_attention_plans_65536_sequences() -> None:
    pool, counts = torch.zeros(1, 2, 16, 64, device=DEVICE), torch.zeros(65_537, dtype=torch.int32, device=DEVICE)
    for b, declined in ((65_536, False), (65_537, True)):
        reason = flash.declines(
            "attention_paged", pool[0, :, :1].transpose(0, 1), counts[:b], pool, pool, counts[:b, None], counts[:b]
        )
        assert ("65536 sequences" in str(reason)) == declined


def test_rotation_serves_1024_coordinates_of_the_same_tokens() -> None:
    rotation, position = spec.Rotation(spec.inv_freq(8)).to(DEVICE), torch.arange(3, device=DEVICE)
    assert flash.declines("rotate", heads(3, 1024), position, rotation) is None
    assert "1024" in str(flash.declines("rotate", heads(3, 1025), position, rotation))
    two = torch.zeros(2, 2, 3, 16, dtype=torch.bfloat16, device=DEVICE)
    reason = flash.declines("rotate_qk", two, heads(3, 16), position, rotation)
    assert "one batch of tokens" in str(reason)
    other = replace(rotation, axis=torch.ones(4, dtype=torch.int64, device=DEVICE))
    assert "share one axis tensor" in str(flash.declines("rerotate", heads(3, 16), position, rotation, other))


def test_merging_reads_a_float32_lse() -> None:
    out = torch.zeros(1, 2, 3, 16, device=DEVICE)
    lse = out[..., 0]
    assert flash.declines("merge", AttentionState(out, lse)) is None
    assert "float32 lse" in str(flash.declines("merge", AttentionState(out, lse.half())))
