# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# ruff: noqa: C901, PLR0912, PLR0915 - a loop that keeps the tensor cores busy is one function
"""FlashAttention backward for sm_90 (Dao 2023, arXiv:2307.08691, Algorithm 2; Shah et al. 2024, arXiv:2407.08608, §3).

A block of threads owns N keys of one key head, keeps them in shared memory, and walks over every tile of M queries
that sees them, of every query head of the group. With P the weights and delta = rowsum(dO ∘ O) - dLSE:

    Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dSᵀ = Pᵀ ∘ (dPᵀ - delta)    dV += Pᵀ dO    dK += dSᵀ Q    dQ += dS K

Scores are held transposed, so that Pᵀ and dSᵀ stay in the registers that their products read them from. dK and dV are
summed in registers too, over all heads of the group, and written once. dQ is summed in memory: every key tile adds its
share to a float32 workspace through the bulk copy engine.

Three kinds of warps share the work ("warp specialisation"):

    loader        one warp: keys and values once, then Q, dO, log-sum-exp and delta of tile after tile, into a ring of
                  STAGES buffers, as far ahead as the ring has room
    warpgroup 0   keys [0, N/2) of the tile: its half of Sᵀ, dPᵀ, dSᵀ, dK and dV; and one half of every dQ
    warpgroup 1   keys [N/2, N), and the other half of every dQ, for which each needs the dS of both

The tensor cores work through what a warpgroup issues in order, while its threads go on. dQ runs one tile late, which
keeps them busy while the threads turn scores into weights, and leaves the other warpgroup a whole tile's time to
deliver its dS. Tile t, for one warpgroup (shared memory holds dS twice, for t and t - 1):

    threads        issue ······· exp2(Sᵀ) ····· Pᵀ ∘ (dPᵀ - delta) · store dS · store dQ, add it to memory ··· next tile
    tensor cores   Sᵀ(t)  dPᵀ(t)  dQ(t-1) ························· dV(t) ···· dK(t) ··································

Barriers in shared memory: `*_full` say that the loader's bytes are there, `*_empty` that both warpgroups have read
them, `scores_full` that both have stored a dS (and finished with the one before it).
Shapes: M queries and N keys of a tile, H = N / 2, D head and E value dimension padded to a power of two.
"""

from .backward_tiles import advance, assignment, sight_of_tile
from .gluon import (
    add_tile,
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

WARPGROUPS = 2


@gluon.jit
def load_partition(
    q, k, v, d_out, lse_two, delta, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, barriers,
    h, group, m, low, high, stop, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Fetch what both warpgroups read."""
    k_full, v_full, q_full, q_empty, d_out_full, d_out_empty, _scores_full = barriers
    H: gl.constexpr = N // 2
    SIZE: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    tile, key_head, batch = assignment(gl.program_id(0), key_tiles, h // group, batches, together)
    low, high, _full_low, _full_high, head_low, head_high = sight_of_tile(
        tile, batch, m, low, high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP
    )
    mbarrier.expect(k_full, N * D * SIZE)
    for half in gl.static_range(2):
        load_tile(k, [batch, key_head, tile * N + half * H, 0], k_full, k_tiles.index(half))
    mbarrier.expect(v_full, N * E * SIZE)
    for half in gl.static_range(2):
        load_tile(v, [batch, key_head, tile * N + half * H, 0], v_full, v_tiles.index(half))
    steps = (high - low + head_high - head_low) // M * group
    start = low
    if KEEP and low == high:
        start = head_low
    head = key_head * group
    for step in range(steps):
        stage = step % STAGES
        phase = step // STAGES & 1
        line = batch * h + head
        mbarrier.wait(q_empty.index(stage), phase ^ 1)
        mbarrier.expect(q_full.index(stage), M * D * SIZE + M * 4)
        load_tile(q, [batch, head, start, 0], q_full.index(stage), q_tiles.index(stage))
        load_tile(lse_two, [line, start], q_full.index(stage), lse_tiles.index(stage))
        mbarrier.wait(d_out_empty.index(stage), phase ^ 1)
        mbarrier.expect(d_out_full.index(stage), M * E * SIZE + M * 4)
        load_tile(d_out, [batch, head, start, 0], d_out_full.index(stage), d_out_tiles.index(stage))
        load_tile(delta, [line, start], d_out_full.index(stage), delta_tiles.index(stage))
        start, head = advance(start, head, low, high, head_low, head_high, 1, M, KEEP)


@gluon.jit
def seen_by(
    i, j, m, batch, low, high, stop, keep, rows, rows_size,
    ROWS: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Which queries i see which keys j: [H, M]. Queries past the end weigh nothing anyhow."""
    if ROWS:
        at = rows + batch.to(gl.int64) * m + i
        first = gl.load(at, mask=i < m, other=0)[None, :]
        last = gl.load(at + rows_size, mask=i < m, other=0)[None, :]
        keys = j[:, None]
        seen = (first <= keys) & (keys < last)
        if KEEP:
            base = gl.load(at + 2 * rows_size, mask=i < m, other=0)[None, :]
            seen = seen | ((base <= keys) & (keys < base + keep) & (keys < last))
    else:
        ahead = j[:, None] - i[None, :]
        seen = (ahead >= low) & (ahead < high) & (j < stop)[:, None]
    return seen


@gluon.jit
def without_dead(tile, dtype: gl.constexpr):
    """Write zeros over NaN and infinity: only keys that no query sees may hold them, and 0 · NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = tile.load(LAYOUT).to(gl.float32)
    tile.store(gl.where(gl.abs(x) < float("inf"), x, 0.0).to(dtype))


@gluon.jit
def multiply_queries(
    w: gl.constexpr, step, score_tiles, k_tiles,
    D: gl.constexpr, H: gl.constexpr, BY_ROWS: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Issue this warpgroup's part of ``dQ = dS K``: half of its rows, or half of its columns."""
    d_query = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    for half in gl.static_range(2):
        d_score = score_tiles.index((step & 1) * 2 + half)
        key = k_tiles.index(half).reshape([H, D])
        if BY_ROWS:
            d_score = d_score.slice(w * ROWS, ROWS, dim=1)
        else:
            key = key.slice(w * COLUMNS, COLUMNS, dim=1)
        d_query = warpgroup_mma(d_score.permute((1, 0)), key, d_query, use_acc=half > 0, is_async=True)
    return d_query


@gluon.jit
def absorb_partition(
    w: gl.constexpr, dq, dk, dv, alibi, rows, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, dq_tiles, barriers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale,
    key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Sum dk and dv of this warpgroup's half of the keys, and add its part of every dq."""
    k_full, v_full, q_full, q_empty, d_out_full, d_out_empty, scores_full = barriers
    H: gl.constexpr = N // 2
    BY_ROWS: gl.constexpr = M == 128
    DQ_ROWS: gl.constexpr = M // 2 if BY_ROWS else M
    DQ_COLUMNS: gl.constexpr = D if BY_ROWS else D // 2
    dtype: gl.constexpr = q_tiles.dtype
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    VALUE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    QUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    LEFT_OF_KEY: gl.constexpr = gl.DotOperandLayout(0, KEY, 2)
    LEFT_OF_VALUE: gl.constexpr = gl.DotOperandLayout(0, VALUE, 2)

    tile, key_head, batch = assignment(gl.program_id(0), key_tiles, h // group, batches, together)
    tiles_low, tiles_high, full_low, full_high, head_low, head_high = sight_of_tile(
        tile, batch, m, low, high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP
    )
    steps = (tiles_high - tiles_low + head_high - head_low) // M * group
    start = tiles_low
    if KEEP and tiles_low == tiles_high:
        start = head_low
    line = (batch * h + key_head * group) * m_padded
    if EACH:
        low = gl.load(sequences + 4 * batch)
        high = gl.load(sequences + 4 * batch + 1)
        stop = gl.load(sequences + 4 * batch + 2)
        position = gl.load(sequences + 4 * batch + 3)
    first_key = tile * N + w * H
    key = k_tiles.index(w).reshape([H, D])
    value = v_tiles.index(w).reshape([H, E])
    dq_tile = dq_tiles.index(w)
    dk_sum = gl.zeros([H, D], gl.float32, KEY)
    dv_sum = gl.zeros([H, E], gl.float32, VALUE)
    nothing = gl.zeros([H, M], gl.float32, SCORE)
    j = first_key + gl.arange(0, H, gl.SliceLayout(1, SCORE))
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    if DEAD:
        without_dead(key, dtype)
        without_dead(value, dtype)
        fence_async_shared()
        barrier()
    if steps > 0:
        mbarrier.wait(q_full.index(0), 0)
    score = warpgroup_mma(key, q_tiles.index(0).reshape([M, D]).permute((1, 0)), nothing, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=(score,))  # [H, M]
    for step in range(steps):
        stage = step % STAGES
        query = q_tiles.index(stage).reshape([M, D])
        gradient = d_out_tiles.index(stage).reshape([M, E])
        mbarrier.wait(d_out_full.index(stage), step // STAGES & 1)
        d_weight = warpgroup_mma(value, gradient.permute((1, 0)), nothing, use_acc=False, is_async=True)
        if SOFTCAP:
            tanh = 1.0 - 2.0 / (1.0 + gl.exp2(score * inner))
            score = outer * tanh
        else:
            score = score * scale
        i = start + gl.arange(0, M, gl.SliceLayout(0, SCORE))
        if ALIBI:
            slope = gl.load(alibi + batch * alibi_b + line // m_padded - batch * h).to(gl.float32) * 1.4426950408889634
            if ROWS:
                stands = gl.load(rows + 3 * rows_size.to(gl.int64) + batch.to(gl.int64) * m + i, mask=i < m, other=0)
            else:
                stands = i + position
            score = score - slope * gl.abs(stands[None, :] - j[:, None]).to(gl.float32)
        if (start < full_low) | (start >= full_high):
            seen = seen_by(i, j, m, batch, low, high, stop, keep, rows, rows_size, ROWS, KEEP)
            score = gl.where(seen, score, float("-inf"))
        weight = gl.exp2(score - lse_tiles.index(stage).load(SCORE))
        flow = delta_tiles.index(stage).load(SCORE)
        d_weight = warpgroup_mma_wait(0, deps=(d_weight,))  # [H, M]
        d_score = weight * (d_weight - flow)
        if SOFTCAP:
            d_score = d_score * (1.0 - tanh * tanh)
        d_score = d_score.to(dtype)
        if ADD:
            # The other warpgroup has multiplied what was here two steps ago: it arrived one step ago.
            score_tiles.index((step & 1) * 2 + w).store(d_score)
            fence_async_shared()
            mbarrier.arrive(scores_full, count=1)
        weight_left = gl.convert_layout(weight.to(dtype), LEFT_OF_VALUE)
        dv_sum = warpgroup_mma(weight_left, gradient, dv_sum, is_async=True)
        dk_sum = warpgroup_mma(gl.convert_layout(d_score, LEFT_OF_KEY), query, dk_sum, is_async=True)
        if ADD:
            mbarrier.wait(scores_full, step & 1)
            dq_part = multiply_queries(w, step, score_tiles, k_tiles, D, H, BY_ROWS, DQ_ROWS, DQ_COLUMNS, QUERY)
            dv_sum = warpgroup_mma_wait(3, deps=(dv_sum,))
            mbarrier.arrive(d_out_empty.index(stage), count=1)
            dk_sum = warpgroup_mma_wait(2, deps=(dk_sum,))
            mbarrier.arrive(q_empty.index(stage), count=1)
        else:
            dv_sum = warpgroup_mma_wait(1, deps=(dv_sum,))
            mbarrier.arrive(d_out_empty.index(stage), count=1)
            dk_sum = warpgroup_mma_wait(0, deps=(dk_sum,))
            mbarrier.arrive(q_empty.index(stage), count=1)
        row = line + start
        start, line = advance(start, line, tiles_low, tiles_high, head_low, head_high, m_padded, M, KEEP)
        # The next scores, or after the last step those of a tile long gone, which nobody reads.
        after = (step + 1) % STAGES
        if step + 1 < steps:
            mbarrier.wait(q_full.index(after), (step + 1) // STAGES & 1)
        score = warpgroup_mma(
            key, q_tiles.index(after).reshape([M, D]).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if ADD:
            dq_part = warpgroup_mma_wait(1, deps=(dq_part,))
            store_wait(0)
            dq_tile.store(dq_part)
            fence_async_shared()
            if BY_ROWS:
                add_tile(dq, [row + w * DQ_ROWS, 0], dq_tile)
            else:
                add_tile(dq, [row, w * DQ_COLUMNS], dq_tile)
        score = warpgroup_mma_wait(0, deps=(score,))  # [H, M]

    if ADD:
        # Both warpgroups read all keys for dQ, and they make room for dK when neither does any more.
        mbarrier.arrive(scores_full, count=1)
        mbarrier.wait(scores_full, steps & 1)
    value.store(dv_sum.to(dtype))
    key.store((dk_sum * full_scale).to(dtype))
    fence_async_shared()
    store_tile(dv, [batch, key_head, first_key, 0], v_tiles.index(w))
    store_tile(dk, [batch, key_head, first_key, 0], k_tiles.index(w))
    store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "alibi_b", "h", "group", "m", "m_padded", "low", "high", "stop", "position", "keep", "rows_size",
        "key_tiles", "batches", "together",
    ]
)  # fmt: skip
def backward_kernel(
    q, k, v, d_out, lse_two, delta, dq, dk, dv, alibi, rows, sequences, seers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale,
    key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Hand out shared memory, barriers and roles."""
    H: gl.constexpr = N // 2
    DQ_ROWS: gl.constexpr = M // 2 if M == 128 else M
    DQ_COLUMNS: gl.constexpr = D if M == 128 else D // 2
    dtype: gl.constexpr = q.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], q.layout)
    d_out_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, E], d_out.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, H, D], k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, H, E], v.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_two.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta.layout)
    if ADD:
        score_tiles = gl.allocate_shared_memory(dtype, [4, H, M], gl.NVMMASharedLayout(128, 16, 2))
        dq_tiles = gl.allocate_shared_memory(gl.float32, [2, DQ_ROWS, DQ_COLUMNS], dq.layout)
    else:
        score_tiles = k_tiles
        dq_tiles = k_tiles
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    scores_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    d_out_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    d_out_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(scores_full, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=2)
        mbarrier.init(d_out_full.index(stage), count=1)
        mbarrier.init(d_out_empty.index(stage), count=2)
    barriers = (k_full, v_full, q_full, q_empty, d_out_full, d_out_empty, scores_full)
    w0: gl.constexpr = 0
    w1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (absorb_partition, (
                w0, dq, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, dq_tiles, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD,
            )),
            (absorb_partition, (
                w1, dq, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, dq_tiles, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD,
            )),
            (load_partition, (
                q, k, v, d_out, lse_two, delta, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, barriers,
                h, group, m, low, high, stop, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
