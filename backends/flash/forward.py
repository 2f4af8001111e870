# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""FlashAttention-2 forward (Dao 2023, arXiv:2307.08691, Algorithm 1): one program per tile of queries.

The fold of `longspan.spec.tiled`, in base two. Key tiles that every row of the query tile sees whole are read in
one loop without a mask, tiles that the mask cuts in another, and the rest not at all.
Shapes: M queries and N keys of a tile, D head and E value dimension padded to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fitting import fitting
from .kin import Sizes
from .launch import Call, describe, flags, numbers_of, renumbered, select
from .plan import Bound, planned
from .tiles import (
    base_two,
    cut_start,
    load_base,
    load_interval,
    load_position,
    load_tile,
    multiply,
    product,
    split,
    visible,
)


@triton.jit
def absorb(
    acc, total, peak, query, k, v, start, batch, head, n, d, e,
    k_b, k_h, k_n, v_b, v_h, v_n, scale, inner, outer, first, last, base, keep, stands, slope,
    CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_E: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr,
    KEEP: tl.constexpr, DEAD: tl.constexpr, DESCRIPTOR: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to what was summed so far: rescale under the new peak, then add."""
    key = load_tile(k, batch, head, start, n, d, k_b, k_h, k_n, N, D, WHOLE_D, CUT, DESCRIPTOR, FAR)
    score = product(query, tl.trans(key), M, N, INTERPRET)  # [M, N]
    j = start + tl.arange(0, N)
    seen = visible(first[:, None], last[:, None], base[:, None], keep, j[None, :], KEEP)
    if NEGATIVE:
        score = -score  # and the scale is given as its magnitude
    if CUT or SOFTCAP or ALIBI:
        score = base_two(score, scale, inner, outer, SOFTCAP)
        if ALIBI:
            score -= slope * tl.abs(stands[:, None] - j[None, :]).to(tl.float32)
        if CUT:
            score = tl.where(seen, score, -float("inf"))
        above = tl.maximum(peak, tl.max(score, 1))
        if CUT:
            # A row that has seen no key yet has no peak; any finite one will do.
            finite = tl.where(above == -float("inf"), 0.0, above)
        else:
            finite = above
        weight = tl.exp2(score - finite[:, None])
    else:
        # The scale is not negative: it commutes with the maximum and fuses with the subtraction.
        above = tl.maximum(peak, tl.max(score, 1) * scale)
        finite = above
        weight = tl.exp2(score * scale - finite[:, None])
    rescale = tl.exp2(peak - finite)
    total = total * rescale + tl.sum(weight, 1)
    acc = acc * rescale[:, None]
    value = load_tile(v, batch, head, start, n, e, v_b, v_h, v_n, N, E, WHOLE_E, CUT, DESCRIPTOR, FAR)
    if CUT and DEAD:
        # A key that no query sees may hold NaN, and 0 · NaN is not 0.
        alive = tl.max(seen.to(tl.int32), 0) > 0
        value = tl.where(alive[:, None], value, 0.0)
    acc = multiply(weight.to(value.dtype), value, acc, INTERPRET)
    return acc, total, above


@planned
@triton.jit(
    do_not_specialize=["m", "n", "low", "high", "stop", "position", "keep", "rows_size", "sink_b", "alibi_b"],
    do_not_specialize_on_alignment=["sink", "alibi", "sequences"],
)
def forward_kernel(
    q, k, v, out, lse, sink, alibi, rows, sequences,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, sink_b, alibi_b,
    h, group, m, n, d, e, low, high, stop, position, keep, rows_size, scale, inner, outer,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_E: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, SINK: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, DEAD: tl.constexpr,
    DESCRIPTOR: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of one head's queries to the keys that it sees."""
    tiles = tl.cdiv(m, M)
    pid = tl.program_id(0)
    # The last tile of a causal head has the most keys: started first, it does not end last.
    row = (tiles - 1 - pid % tiles) * M
    head = (pid // tiles) % h
    batch = pid // tiles // h
    i = row + tl.arange(0, M)
    first, last = load_interval(i, m, batch, low, high, stop, rows, rows_size, sequences, ROWS, EACH)
    exists = i < m
    lowest = tl.min(tl.where(exists, first, n), 0)
    highest = tl.max(last, 0)
    start, left, full_low, full, full_high, right = split(
        lowest, highest, tl.max(tl.where(exists, first, 0), 0), tl.min(tl.where(exists, last, n), 0), N
    )
    head_low = start
    heads = start * 0
    base = first
    if KEEP:
        base = load_base(i, m, batch, rows, rows_size)
        head_low = tl.maximum(tl.min(tl.where(exists, base, n), 0), 0) // N * N
        head_high = tl.minimum(tl.max(tl.where(exists, tl.minimum(base + keep, last), 0), 0), start)
        heads = tl.cdiv(tl.maximum(head_high - head_low, 0), N)
    slope = 0.0
    stands = i
    if ALIBI:
        slope = tl.load(alibi + batch * alibi_b + head).to(tl.float32) * 1.4426950408889634
        stands = load_position(i, m, batch, position, rows, rows_size, sequences, ROWS, EACH)

    query = load_tile(q, batch, head, row, m, d, q_b, q_h, q_m, M, D, WHOLE_D, True, DESCRIPTOR, FAR)  # [M, D]
    acc = tl.zeros([M, E], tl.float32)
    if SINK:
        # A key of value zero: the fold starts from it.
        sink_score = tl.load(sink + batch * sink_b + head).to(tl.float32)
        peak = tl.zeros([M], tl.float32) + sink_score * 1.4426950408889634
        total = tl.full([M], 1.0, tl.float32)
    else:
        peak = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
    for t in tl.range(0, full):
        acc, total, peak = absorb(
            acc, total, peak, query, k, v, full_low + t * N, batch, head // group, n, d, e,
            k_b, k_h, k_n, v_b, v_h, v_n, scale, inner, outer, first, last, base, keep, stands, slope,
            False, M, N, D, E, WHOLE_D, WHOLE_E, SOFTCAP, ALIBI, NEGATIVE, KEEP, DEAD, DESCRIPTOR, FAR, INTERPRET,
        )  # fmt: skip
    for t in tl.range(0, heads + left + right):
        acc, total, peak = absorb(
            acc, total, peak, query, k, v, cut_start(t, head_low, heads, start, left, full_high, N),
            batch, head // group, n, d, e,
            k_b, k_h, k_n, v_b, v_h, v_n, scale, inner, outer, first, last, base, keep, stands, slope,
            True, M, N, D, E, WHOLE_D, WHOLE_E, SOFTCAP, ALIBI, NEGATIVE, KEEP, DEAD, DESCRIPTOR, FAR, INTERPRET,
        )  # fmt: skip
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    log_sum = (tl.where(empty, 0.0, peak) + tl.log2(total)) * 0.6931471805599453
    if SINK:
        # A row without keys keeps the sink exactly, which log2 and back would round.
        log_sum = tl.where((total == 1.0) & (peak == sink_score * 1.4426950408889634), sink_score, log_sum)
    line = (batch * h + head).to(tl.int64) * m + i
    tl.store(lse + line, tl.where(empty, -float("inf"), log_sum), mask=exists)
    across = tl.arange(0, E)
    at = out + line[:, None] * e + across[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=exists[:, None] & (across < e)[None, :])


@fitting
def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: ``out [b, h, m, e]`` contiguous, and ``lse [b, h, m]`` float32."""
    (b, h, m, _), e = q.shape, v.shape[3]
    out = q.new_empty(b, h, m, e, dtype=call.out_dtype)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    choice = select("forward", call, q, k, v)
    tall, wide = choice.tile_m, choice.tile_n
    bound = forward_kernel[(-(-m // tall) * h * b,)](
        describe(q, tall, choice), describe(k, wide, choice), describe(v, wide, choice), out, lse,
        call.sink, call.alibi, call.rows, call.sequences, *numbers_of(call, q, k, v),
        SINK=call.sink is not None, **flags(call, choice, q, k, v),
    )  # fmt: skip
    if call.wanted and bound is not None:
        call.keep(Repeated(bound, out.new_empty(0), lse.new_empty(0), out.shape, tall))
    return out, lse


class Repeated(NamedTuple):
    """A launch of the forward kernel, to be repeated on other tensors; see `launch.Again`.

    Attributes:
        bound: The launch.
        out: An empty tensor of the dtype and device of ``out``.
        lse: The same of ``lse``.
        shape: Shape of ``out``.
        tall: Queries of a tile.
    """

    bound: Bound
    out: Tensor
    lse: Tensor
    shape: tuple[int, ...]
    tall: int

    def resized(self, sizes: Sizes, interval: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> "Repeated":
        """Take the code to a problem that differs in sizes alone; see `growing.form`."""
        b, h, _, e = self.shape
        grid, numbers = (-(-sizes.m // self.tall) * h * b,), renumbered(self.bound.numbers, b, sizes, interval)
        bound = self.bound.resized(grid, numbers, q, k, v)
        return self._replace(bound=bound, shape=(b, h, sizes.m, e))

    def longer(self, n: int, interval: tuple[int, ...]) -> None:
        """Say that this code depends on more of the number of keys; see `launch.Again`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, alibi: Tensor | None,
        sequences: Tensor | None = None, rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Launch on new results."""
        out, lse = self.out.new_empty(self.shape), self.lse.new_empty(self.shape[:3])
        launched = self.bound(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
            0 if sink is None else sink.data_ptr(), 0 if alibi is None else alibi.data_ptr(),
            0 if rows is None else rows.data_ptr(), 0 if sequences is None else sequences.data_ptr(),
        )  # fmt: skip
        return (out, lse) if launched else None
