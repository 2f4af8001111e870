# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""FlashAttention-2 backward (Dao 2023, arXiv:2307.08691, Algorithm 2), split so that it is deterministic.

One kernel has a program per tile of keys, which reads the queries that see it and sums dk and dv; another a program
per tile of queries, which sums dq. Scores are recomputed in both (seven matrix products instead of five), and in
return nothing is added atomically: every number is summed by one program in one order.
With P the weights, delta = rowsum(dO ∘ O) - dLSE and dS = P ∘ (dO Vᵀ - delta): dq = scale · dS K,
dk = scale · dSᵀ Q, dv = Pᵀ dO.
Shapes: M queries and N keys of a tile, D head and E value dimension padded to a power of two.
"""

import math
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .fitting import fitting
from .launch import ALIGNED, INTERPRETED, LOG2_E, Call, describe, flags, padded, per_sequence, select, strides
from .plan import planned
from .sight import sight
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

LINE: Final = ALIGNED // 4  # float32 numbers


@planned
@triton.jit
def prepare_kernel(
    out, d_out, lse, d_lse, lse_two, delta, o_b, o_h, o_m, h, m, e, rows, pitch,
    R: tl.constexpr, E: tl.constexpr, D_LSE: tl.constexpr,
):  # fmt: skip
    """Write delta and the log-sum-exp over ln 2, the latter +inf for rows without keys, whose weights are then 0."""
    line = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    exists = line < rows
    across = tl.arange(0, E)
    inside = exists[:, None] & (across < e)[None, :]
    head = line // m
    at = d_out + (head // h) * o_b + (head % h) * o_h + (line % m) * o_m
    gradient = tl.load(at[:, None] + across[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(out + line[:, None] * e + across[None, :], mask=inside, other=0.0).to(tl.float32)
    flow = tl.sum(gradient * mean, 1)
    if D_LSE:
        flow -= tl.load(d_lse + line, mask=exists, other=0.0)
    log_sum = tl.load(lse + line, mask=exists, other=0.0) * 1.4426950408889634
    line = head * pitch + line % m
    tl.store(delta + line, flow, mask=exists)
    tl.store(lse_two + line, tl.where(log_sum == -float("inf"), float("inf"), log_sum), mask=exists)


@triton.jit
def capped_slope(score, outer):
    """Derivative of a capped score by its uncapped one: 1 - tanh²."""
    tanh = score / outer
    return 1.0 - tanh * tanh


@triton.jit
def counted(head, at, low, high):
    """Go on to the next head, and back to ``low``, where ``at`` has come to ``high``."""
    ends = at >= high
    return tl.where(ends, head + 1, head), tl.where(ends, low, at)


@triton.jit
def absorb_queries(
    dk, dv, key, value, q, d_out, lse_two, delta, alibi, start, batch, head, h, m, d, e, j,
    q_b, q_h, q_m, o_b, o_h, o_m, alibi_b, scale, inner, outer,
    low, high, stop, position, keep, rows, rows_size, sequences, pitch,
    CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_E: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, DEAD: tl.constexpr,
    DESCRIPTOR: tl.constexpr, LINES: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add what one tile of queries sends to a tile of keys."""
    query = load_tile(q, batch, head, start, m, d, q_b, q_h, q_m, M, D, WHOLE_D, CUT, DESCRIPTOR, FAR)  # [M, D]
    i = start + tl.arange(0, M)
    if LINES:
        # Every lane needs a quarter of these numbers, and would fetch them one by one.
        log_sum = lse_two.load([batch * h + head, start]).reshape([M])
        flow = delta.load([batch * h + head, start]).reshape([M])
    else:
        line = (batch * h + head).to(tl.int64) * pitch + i
        if CUT:
            log_sum = tl.load(lse_two + line, mask=i < m, other=float("inf"))
            flow = tl.load(delta + line, mask=i < m, other=0.0)
        else:
            log_sum = tl.load(lse_two + line)
            flow = tl.load(delta + line)
    score = product(key, tl.trans(query), N, M, INTERPRET)  # [N, M]
    if NEGATIVE:
        score = -score
    capped = base_two(score, scale, inner, outer, SOFTCAP)
    score = capped
    if ALIBI:
        slope = tl.load(alibi + batch * alibi_b + head).to(tl.float32) * 1.4426950408889634
        stands = load_position(i, m, batch, position, rows, rows_size, sequences, ROWS, EACH)
        score = capped - slope * tl.abs(stands[None, :] - j[:, None]).to(tl.float32)
    seen = j[:, None] >= 0
    if CUT:
        first, last = load_interval(i, m, batch, low, high, stop, rows, rows_size, sequences, ROWS, EACH)
        base = first
        if KEEP:
            base = load_base(i, m, batch, rows, rows_size)
        seen = visible(first[None, :], last[None, :], base[None, :], keep, j[:, None], KEEP)
        score = tl.where(seen, score, -float("inf"))
    weight = tl.exp2(score - log_sum[None, :])
    gradient = load_tile(d_out, batch, head, start, m, e, o_b, o_h, o_m, M, E, WHOLE_E, CUT, DESCRIPTOR, FAR)
    dv = multiply(weight.to(gradient.dtype), gradient, dv, INTERPRET)
    d_score = weight * (product(value, tl.trans(gradient), N, M, INTERPRET) - flow[None, :])
    if SOFTCAP:
        d_score *= capped_slope(capped, outer)
    if CUT and DEAD:
        # Keys and values that no query sees may hold NaN.
        d_score = tl.where(seen, d_score, 0.0)
    dk = multiply(d_score.to(query.dtype), query, dk, INTERPRET)
    return dk, dv


@planned
@triton.jit(
    do_not_specialize=[
        "m",
        "n",
        "low",
        "high",
        "stop",
        "position",
        "keep",
        "rows_size",
        "alibi_b",
        "key_tiles",
        "pitch",
    ]
)
def backward_keys_kernel(
    q, k, v, d_out, dk, dv, lse_two, delta, alibi, rows, sequences, seers,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, alibi_b,
    h, group, m, n, d, e, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale, key_tiles, pitch,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_E: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, DEAD: tl.constexpr,
    DESCRIPTOR: tl.constexpr, LINES: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum dk and dv of one tile of keys over all queries, of all heads of its group, that see it."""
    pid = tl.program_id(0)
    # The first tile of a causal head is seen by the most queries: started first, it does not end last.
    tile = pid % key_tiles
    start = tile * N
    key_heads = h // group
    key_head = (pid // key_tiles) % key_heads
    batch = pid // key_tiles // key_heads
    if ROWS:
        at = seers + 6 * (batch * key_tiles + tile).to(tl.int64)
        lowest = tl.load(at)
        highest = tl.load(at + 1)
        full_lowest = tl.load(at + 2)
        full_highest = tl.load(at + 3)
    else:
        edge_low = low
        edge_high = high
        edge_stop = stop
        if EACH:
            edge_low = tl.load(sequences + 4 * batch)
            edge_high = tl.load(sequences + 4 * batch + 1)
            edge_stop = tl.load(sequences + 4 * batch + 2)
        lowest = tl.maximum(start - edge_high + 1, 0)
        highest = tl.where(start < edge_stop, tl.minimum(start + N - edge_low, m), 0)
        full_lowest = tl.maximum(start + N - edge_high, 0)
        full_highest = tl.where(start + N <= edge_stop, tl.minimum(start - edge_low + 1, m), 0)
    first, left, full_low, full, full_high, right = split(lowest, highest, full_lowest, full_highest, M)
    head_low = first
    heads = first * 0
    if KEEP:
        # Rows beyond those that see the tile as part of their interval, and see it as the head of their document.
        head_low = tl.maximum(tl.load(at + 4) // M * M, full_high + right * M)
        heads = tl.cdiv(tl.maximum(tl.load(at + 5) - head_low, 0), M)

    j = start + tl.arange(0, N)
    key = load_tile(k, batch, key_head, start, n, d, k_b, k_h, k_n, N, D, WHOLE_D, True, DESCRIPTOR, FAR)
    value = load_tile(v, batch, key_head, start, n, e, v_b, v_h, v_n, N, E, WHOLE_E, True, DESCRIPTOR, FAR)
    dk_sum = tl.zeros([N, D], tl.float32)
    dv_sum = tl.zeros([N, E], tl.float32)
    # All heads of the group in one loop, counted on: a division would hold up the copy engine at every tile.
    head = key_head * group
    at = full_low
    for _ in tl.range(0, full * group):
        dk_sum, dv_sum = absorb_queries(
            dk_sum, dv_sum, key, value, q, d_out, lse_two, delta, alibi,
            at, batch, head, h, m, d, e, j,
            q_b, q_h, q_m, o_b, o_h, o_m, alibi_b, scale, inner, outer,
            low, high, stop, position, keep, rows, rows_size, sequences, pitch,
            False, M, N, D, E, WHOLE_D, WHOLE_E, ROWS, EACH, KEEP, SOFTCAP, ALIBI, NEGATIVE, DEAD,
            DESCRIPTOR, LINES, FAR, INTERPRET,
        )  # fmt: skip
        head, at = counted(head, at + M, full_low, full_high)
    head = key_head * group
    t = heads * 0
    cut = heads + left + right
    for _ in tl.range(0, cut * group):
        dk_sum, dv_sum = absorb_queries(
            dk_sum, dv_sum, key, value, q, d_out, lse_two, delta, alibi,
            cut_start(t, head_low, heads, first, left, full_high, M), batch, head,
            h, m, d, e, j, q_b, q_h, q_m, o_b, o_h, o_m, alibi_b, scale, inner, outer,
            low, high, stop, position, keep, rows, rows_size, sequences, pitch,
            True, M, N, D, E, WHOLE_D, WHOLE_E, ROWS, EACH, KEEP, SOFTCAP, ALIBI, NEGATIVE, DEAD,
            DESCRIPTOR, LINES, FAR, INTERPRET,
        )  # fmt: skip
        head, t = counted(head, t + 1, t * 0, cut)
    line = ((batch * key_heads + key_head).to(tl.int64) * n + j)[:, None]
    wide = tl.arange(0, D)[None, :]
    tl.store(dk + line * d + wide, (dk_sum * full_scale).to(dk.dtype.element_ty), mask=(j < n)[:, None] & (wide < d))
    wide = tl.arange(0, E)[None, :]
    tl.store(dv + line * e + wide, dv_sum.to(dv.dtype.element_ty), mask=(j < n)[:, None] & (wide < e))


@triton.jit
def absorb_keys(
    dq, query, gradient, log_sum, flow, k, v, start, batch, head, n, d, e,
    k_b, k_h, k_n, v_b, v_h, v_n, scale, inner, outer, first, last, base, keep, stands, slope,
    CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_E: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr,
    KEEP: tl.constexpr, DEAD: tl.constexpr, DESCRIPTOR: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys sends back to a tile of queries."""
    key = load_tile(k, batch, head, start, n, d, k_b, k_h, k_n, N, D, WHOLE_D, CUT, DESCRIPTOR, FAR)
    value = load_tile(v, batch, head, start, n, e, v_b, v_h, v_n, N, E, WHOLE_E, CUT, DESCRIPTOR, FAR)
    j = start + tl.arange(0, N)
    score = product(query, tl.trans(key), M, N, INTERPRET)  # [M, N]
    if NEGATIVE:
        score = -score
    capped = base_two(score, scale, inner, outer, SOFTCAP)
    score = capped
    if ALIBI:
        score = capped - slope * tl.abs(stands[:, None] - j[None, :]).to(tl.float32)
    seen = visible(first[:, None], last[:, None], base[:, None], keep, j[None, :], KEEP)
    if CUT:
        score = tl.where(seen, score, -float("inf"))
    weight = tl.exp2(score - log_sum[:, None])
    d_score = weight * (product(gradient, tl.trans(value), M, N, INTERPRET) - flow[:, None])
    if SOFTCAP:
        d_score *= capped_slope(capped, outer)
    if CUT and DEAD:
        # Keys and values that no query sees may hold NaN.
        d_score = tl.where(seen, d_score, 0.0)
        alive = tl.max(seen.to(tl.int32), 0) > 0
        key = tl.where(alive[:, None], key, 0.0)
    return multiply(d_score.to(key.dtype), key, dq, INTERPRET)


@planned
@triton.jit(do_not_specialize=["m", "n", "low", "high", "stop", "position", "keep", "rows_size", "alibi_b", "pitch"])
def backward_queries_kernel(
    q, k, v, d_out, dq, lse_two, delta, alibi, rows, sequences,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, alibi_b,
    h, group, m, n, d, e, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale, pitch,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_E: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, DEAD: tl.constexpr,
    DESCRIPTOR: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum dq of one tile of one head's queries over the keys that it sees."""
    tiles = tl.cdiv(m, M)
    pid = tl.program_id(0)
    row = (tiles - 1 - pid % tiles) * M
    head = (pid // tiles) % h
    batch = pid // tiles // h
    i = row + tl.arange(0, M)
    first, last = load_interval(i, m, batch, low, high, stop, rows, rows_size, sequences, ROWS, EACH)
    exists = i < m
    start, left, full_low, full, full_high, right = split(
        tl.min(tl.where(exists, first, n), 0), tl.max(last, 0),
        tl.max(tl.where(exists, first, 0), 0), tl.min(tl.where(exists, last, n), 0), N,
    )  # fmt: skip
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
    line = (batch * h + head).to(tl.int64) * pitch + i
    log_sum = tl.load(lse_two + line, mask=exists, other=float("inf"))
    flow = tl.load(delta + line, mask=exists, other=0.0)
    query = load_tile(q, batch, head, row, m, d, q_b, q_h, q_m, M, D, WHOLE_D, True, DESCRIPTOR, FAR)
    gradient = load_tile(d_out, batch, head, row, m, e, o_b, o_h, o_m, M, E, WHOLE_E, True, DESCRIPTOR, FAR)
    dq_sum = tl.zeros([M, D], tl.float32)
    for t in tl.range(0, full):
        dq_sum = absorb_keys(
            dq_sum, query, gradient, log_sum, flow, k, v, full_low + t * N, batch, head // group, n, d, e,
            k_b, k_h, k_n, v_b, v_h, v_n, scale, inner, outer, first, last, base, keep, stands, slope,
            False, M, N, D, E, WHOLE_D, WHOLE_E, SOFTCAP, ALIBI, NEGATIVE, KEEP, DEAD, DESCRIPTOR, FAR, INTERPRET,
        )  # fmt: skip
    for t in tl.range(0, heads + left + right):
        dq_sum = absorb_keys(
            dq_sum, query, gradient, log_sum, flow, k, v, cut_start(t, head_low, heads, start, left, full_high, N),
            batch, head // group, n, d, e,
            k_b, k_h, k_n, v_b, v_h, v_n, scale, inner, outer, first, last, base, keep, stands, slope,
            True, M, N, D, E, WHOLE_D, WHOLE_E, SOFTCAP, ALIBI, NEGATIVE, KEEP, DEAD, DESCRIPTOR, FAR, INTERPRET,
        )  # fmt: skip
    wide = tl.arange(0, D)[None, :]
    at = dq + ((batch * h + head).to(tl.int64) * m + i)[:, None] * d + wide
    tl.store(at, (dq_sum * full_scale).to(dq.dtype.element_ty), mask=exists[:, None] & (wide < d))


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels.

    Beside the gradients it allocates two float32 numbers a row (six more a head at most), and a copy of ``d_out`` if
    that is of another dtype than v or has no unit last stride.

    Returns:
        Gradients of q, k and v, contiguous, and of the sinks by sequence, ``[b, h]``, or ``[b, 0]`` without sinks.
    """
    b, h, m, e = out.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # Rows that the copy engine can address: each begins at a multiple of 16 bytes.
    lse_two, delta = lse.new_empty(2, b, h, LINE * math.ceil(m / LINE))[..., :m]
    d_out = d_out.to(v.dtype)
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    if out.numel():
        tall = 64 if INTERPRETED else 16
        prepare_kernel[(triton.cdiv(b * h * m, tall),)](
            out, d_out, lse, d_lse, lse_two, delta, *strides(d_out), h, m, e, b * h * m, lse_two.stride(1),
            R=tall, E=padded(e), D_LSE=d_lse is not None,
        )  # fmt: skip
    if dq.numel():
        launch_queries(call, q, k, v, d_out, lse_two, delta, dq)
    if dk.numel():
        launch_keys(call, q, k, v, d_out, lse_two, delta, dk, dv)
    if call.sink is None:
        return dq, dk, dv, lse.new_empty(b, 0)
    # The sink's weight is exp(sink - lse) and its value zero: dS = P (0 - delta).
    share = torch.exp2(call.sink.float()[..., None] * LOG2_E - lse_two)
    return dq, dk, dv, -(share * delta).sum(2)


@fitting
def launch_queries(
    call: Call, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse_two: Tensor, delta: Tensor, dq: Tensor
) -> None:
    """Launch the kernel that sums dq."""
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    choice = select("backward_queries", call, q, k, v, d_out)
    tall, wide = choice.tile_m, choice.tile_n
    backward_queries_kernel[(triton.cdiv(m, tall) * h * b,)](
        describe(q, tall, choice), describe(k, wide, choice), describe(v, wide, choice), describe(d_out, tall, choice),
        dq, lse_two, delta, call.alibi, call.rows, call.sequences, *strides(q, k, v, d_out), per_sequence(call.alibi),
        h, h // g, m, n, d, e, *call.interval, b * m, *call.factors, call.scale, lse_two.stride(1),
        **flags(call, choice, q, k, v, d_out),
    )  # fmt: skip


@fitting
def launch_keys(
    call: Call, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse_two: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Launch the kernel that sums dk and dv."""
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    choice = select("backward_keys", call, q, k, v, d_out)
    tall, wide = choice.tile_m, choice.tile_n
    tiles = triton.cdiv(n, wide)
    seers = None if call.rows is None else sight(call.rows, call.interval[4], n, wide)
    lines = choice.descriptors and lse_two.stride(1) % LINE == 0

    def described(x: Tensor) -> Any:
        return TensorDescriptor(x, [b * h, m], [x.stride(1), 1], [1, tall]) if lines else x

    backward_keys_kernel[(tiles * g * b,)](
        describe(q, tall, choice), describe(k, wide, choice), describe(v, wide, choice), describe(d_out, tall, choice),
        dk, dv, described(lse_two), described(delta), call.alibi, call.rows, call.sequences, seers,
        *strides(q, k, v, d_out), per_sequence(call.alibi),
        h, h // g, m, n, d, e, *call.interval, b * m, *call.factors, call.scale, tiles,
        lse_two.stride(1), LINES=lines, **flags(call, choice, q, k, v, d_out),
    )  # fmt: skip
