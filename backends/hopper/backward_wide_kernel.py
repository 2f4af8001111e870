# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# ruff: noqa: PLR0915 - a loop that keeps the tensor cores busy is one function
"""`backward_kernel` for heads wider than 128, whose dK and dV are too wide for one warpgroup's registers.

Here both warpgroups have the same 64 keys, and each sums one half of the columns of dK, dV and dQ. Both compute all
scores: two of the five matrix products are done twice, and in return no warpgroup waits for the other within a tile.

    threads        issue ······ exp2(Sᵀ) · Pᵀ ∘ (dPᵀ - delta) · store dS ················ add dQ to memory ··· next tile
    tensor cores   Sᵀ  dPᵀ ·································· dV(half)  dK(half)  dQ(half)

Every matrix lies in shared memory as two halves of columns.
Shapes: M = N = 64 queries and keys of a tile, C = D / 2 columns of q and k, F = E / 2 of v and dO.
"""

from .backward_scores import add_queries, masked, penalised, read_number, without_dead, write_number
from .backward_tiles import advance, assignment, count_tiles, sight_of_tile
from .gluon import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    store_tile,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def load_partition(
    q, k, v, d_out, lse_two, delta, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, places, barriers,
    h, group, m, m_padded, low, high, stop, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Fetch what both warpgroups read."""
    kv_full, q_full, d_out_full, empty, _both = barriers
    SIZE: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    tile, key_head, batch = assignment(gl.program_id(0), key_tiles, h // group, batches, together)
    low, high, full_low, full_high, head_low, head_high = sight_of_tile(
        tile, batch, m, low, high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP
    )
    mbarrier.expect(kv_full, 2 * N * (C + F) * SIZE)
    for half in gl.static_range(2):
        load_tile(k, [batch, key_head, tile * N, half * C], kv_full, k_tiles.index(half))
        load_tile(v, [batch, key_head, tile * N, half * F], kv_full, v_tiles.index(half))
    steps = (high - low + head_high - head_low) // M * group
    start = low
    if KEEP and low == high:
        start = head_low
    head = key_head * group
    for step in range(steps):
        stage = step % STAGES
        line = batch * h + head
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        cut = gl.where((start < full_low) | (start >= full_high), 1, 0)
        write_number(places.index(2 * stage), line * m_padded + start, 1)
        write_number(places.index(2 * stage + 1), 2 * start + cut, 1)
        mbarrier.expect(q_full.index(stage), 2 * M * C * SIZE + M * 4)
        for half in gl.static_range(2):
            load_tile(q, [batch, head, start, half * C], q_full.index(stage), q_tiles.index(2 * stage + half))
        load_tile(lse_two, [line, start], q_full.index(stage), lse_tiles.index(stage))
        mbarrier.expect(d_out_full.index(stage), 2 * M * F * SIZE + M * 4)
        for half in gl.static_range(2):
            load_tile(
                d_out, [batch, head, start, half * F], d_out_full.index(stage), d_out_tiles.index(2 * stage + half)
            )
        load_tile(delta, [line, start], d_out_full.index(stage), delta_tiles.index(stage))
        start, head = advance(start, head, low, high, head_low, head_high, 1, M, KEEP)


@gluon.jit
def multiply_halves(
    left, nil, right, first, ROWS: gl.constexpr, M: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Issue ``left @ rightᵀ`` [ROWS, M], both in halves of columns."""
    product = gl.zeros([ROWS, M], gl.float32, LAYOUT)
    for half in gl.static_range(2):
        product = warpgroup_mma(
            left.index(half + nil).reshape([ROWS, COLUMNS]),
            right.index(first + half).reshape([M, COLUMNS]).permute((1, 0)),
            product, use_acc=half > 0, is_async=True,
        )  # fmt: skip
    return product


@gluon.jit
def multiply_quarter(
    half, quarter: gl.constexpr, d_score, k_tiles,
    N: gl.constexpr, M: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Issue ``dQ = dS K`` for a quarter of the columns: [M, C / 2]."""
    key = k_tiles.index(half).reshape([N, C]).slice(quarter * (C // 2), C // 2, dim=1)
    nothing = gl.zeros([M, C // 2], gl.float32, LAYOUT)
    return warpgroup_mma(d_score.permute((1, 0)), key, nothing, use_acc=False, is_async=True)


@gluon.jit
def absorb_partition(
    w: gl.constexpr, sums, dk, dv, alibi, rows, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, places, barriers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale,
    key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Sum this warpgroup's half of the columns of dk and dv, and add its half of every dq."""
    kv_full, q_full, d_out_full, empty, both = barriers
    dtype: gl.constexpr = q_tiles.dtype
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    VALUE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    QUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C // 2, 16])
    LEFT_OF_KEY: gl.constexpr = gl.DotOperandLayout(0, KEY, 2)
    LEFT_OF_VALUE: gl.constexpr = gl.DotOperandLayout(0, VALUE, 2)
    tile, key_head, batch = assignment(gl.program_id(0), key_tiles, h // group, batches, together)
    steps = count_tiles(tile, batch, m, low, high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP) * group
    j = tile * N + gl.arange(0, N, gl.SliceLayout(1, SCORE))
    dk_sum = gl.zeros([N, C], gl.float32, KEY)
    dv_sum = gl.zeros([N, F], gl.float32, VALUE)
    mbarrier.wait(kv_full, 0)
    if DEAD:
        without_dead(k_tiles.index(w).reshape([N, C]), dtype)
        without_dead(v_tiles.index(w).reshape([N, F]), dtype)
        fence_async_shared()
        mbarrier.arrive(both, count=1)
        mbarrier.wait(both, 0)
    for step in range(steps):
        stage = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(q_full.index(stage), phase)
        row = read_number(places.index(2 * stage), 4)
        place = read_number(places.index(2 * stage + 1), 4)
        # Always 0, which the compiler cannot know: it would keep the address of every piece of K in registers.
        nil = place >> 31
        score = multiply_halves(k_tiles, nil, q_tiles, 2 * stage, N, M, C, SCORE)
        mbarrier.wait(d_out_full.index(stage), phase)
        d_weight = multiply_halves(v_tiles, nil, d_out_tiles, 2 * stage, N, M, F, SCORE)
        score = warpgroup_mma_wait(2, deps=(score,))  # [N, M]
        if SOFTCAP:
            tanh = 1.0 - 2.0 / (1.0 + gl.exp2(score * inner))
            score = outer * tanh
        else:
            score = score * scale
        i = place // 2 + gl.arange(0, M, gl.SliceLayout(0, SCORE))
        if ALIBI:
            at = batch * alibi_b + row // m_padded - batch * h
            score = penalised(score, i, j, m, batch, alibi, at, position, rows, rows_size, sequences, ROWS, EACH)
        if place & 1 == 1:
            score = masked(score, i, j, m, batch, low, high, stop, keep, rows, rows_size, sequences, ROWS, EACH, KEEP)
        weight = gl.exp2(score - lse_tiles.index(stage).load(SCORE))
        weight_left = gl.convert_layout(weight.to(dtype), LEFT_OF_VALUE)
        if SOFTCAP:
            weight = weight * (1.0 - tanh * tanh)
        flow = delta_tiles.index(stage).load(SCORE)
        d_weight = warpgroup_mma_wait(0, deps=(d_weight,))  # [N, M]
        d_score = (weight * (d_weight - flow)).to(dtype)
        gradient = d_out_tiles.index(2 * stage + w).reshape([M, F])
        query = q_tiles.index(2 * stage + w).reshape([M, C])
        dv_sum = warpgroup_mma(weight_left, gradient, dv_sum, is_async=True)
        if ADD:
            score_tiles.index(w).store(d_score)
            fence_async_shared()
            barrier()
        dk_sum = warpgroup_mma(gl.convert_layout(d_score, LEFT_OF_KEY), query, dk_sum, is_async=True)
        if ADD:
            upper = multiply_quarter(w + nil, 0, score_tiles.index(w), k_tiles, N, M, C, QUERY)
            dv_sum, dk_sum = warpgroup_mma_wait(1, deps=(dv_sum, dk_sum))
            mbarrier.arrive(empty.index(stage), count=1)
            lower = multiply_quarter(w + nil, 1, score_tiles.index(w), k_tiles, N, M, C, QUERY)
            upper = warpgroup_mma_wait(1, deps=(upper,))
            at = sums + row.to(gl.int64) * (2 * C) + w * (M * C)
            add_queries(at, upper, C // 2)
            lower = warpgroup_mma_wait(0, deps=(lower,))
            add_queries(at + M * C // 2, lower, C // 2)
        else:
            dv_sum, dk_sum = warpgroup_mma_wait(0, deps=(dv_sum, dk_sum))
            mbarrier.arrive(empty.index(stage), count=1)
    # Both warpgroups read all keys and values, and make room for dK and dV when neither does any more.
    mbarrier.arrive(both, count=1)
    mbarrier.wait(both, 1 if DEAD else 0)
    v_tiles.index(w).reshape([N, F]).store(dv_sum.to(dtype))
    k_tiles.index(w).reshape([N, C]).store((dk_sum * full_scale).to(dtype))
    fence_async_shared()
    store_tile(dv, [batch, key_head, tile * N, w * F], v_tiles.index(w))
    store_tile(dk, [batch, key_head, tile * N, w * C], k_tiles.index(w))
    store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "alibi_b", "h", "group", "m", "m_padded", "low", "high", "stop", "position", "keep", "rows_size",
        "key_tiles", "batches", "together",
    ]
)  # fmt: skip
def backward_wide_kernel(
    q, k, v, d_out, lse_two, delta, sums, dk, dv, alibi, rows, sequences, seers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale,
    key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Hand out shared memory, barriers and roles."""
    C: gl.constexpr = D // 2
    F: gl.constexpr = E // 2
    dtype: gl.constexpr = q.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, M, C], q.layout)
    d_out_tiles = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, M, F], d_out.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, N, C], k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, N, F], v.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_two.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta.layout)
    score_tiles = gl.allocate_shared_memory(dtype, [2, N, M], gl.NVMMASharedLayout(128, 16, 2))
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    both = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    d_out_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(both, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(d_out_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    barriers = (kv_full, q_full, d_out_full, empty, both)
    w0: gl.constexpr = 0
    w1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (absorb_partition, (
                w0, sums, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, places, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, C, F, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD,
            )),
            (absorb_partition, (
                w1, sums, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, places, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, C, F, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD,
            )),
            (load_partition, (
                q, k, v, d_out, lse_two, delta, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, places, barriers,
                h, group, m, m_padded, low, high, stop, key_tiles, batches, together,
                M, N, C, F, STAGES, ROWS, EACH, KEEP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
