# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# ruff: noqa: C901, PLR0912, PLR0915 - a loop that keeps the tensor cores busy is one function
"""FlashAttention backward for sm_90 (Dao 2023, arXiv:2307.08691, Algorithm 2; Shah et al. 2024, arXiv:2407.08608, §3).

A block of threads takes N keys of one key head into shared memory, and walks over every tile of M queries that sees
them, of every query head of the group. With P the weights and delta = rowsum(dO ∘ O) - dLSE:

    Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dSᵀ = Pᵀ ∘ (dPᵀ - delta)    dV += Pᵀ dO    dK += dSᵀ Q    dQ += dS K

Scores are held transposed, so that Pᵀ and dSᵀ stay in the registers that their products read them from. dK and dV are
summed in registers too, over all heads of the group, and written once. dQ is summed in memory: what a tile of keys has
to add goes from registers to a float32 workspace, four numbers at a time, in the order in which the tensor cores left
them; `backward_passes.finish_kernel` sorts, scales and rounds them.

Three kinds of warps share the work ("warp specialisation"):

    loader        one warp: keys and values, then Q, dO, log-sum-exp and delta of tile after tile into a ring of STAGES
                  buffers, as far ahead as there is room: the next keys, too, are fetched while these are worked on
    warpgroup 0   keys [0, N/2) of the tile: its half of Sᵀ, dPᵀ, dSᵀ, dK and dV; and one half of every dQ
    warpgroup 1   keys [N/2, N), and the other half of every dQ, for which each needs the dS of both

The tensor cores work through what a warpgroup issues in order, while its threads go on. Tile t, for one warpgroup;
the other is somewhere else in the same line, and fills the gaps:

    threads        issue · exp2(Sᵀ) · Pᵀ ∘ (dPᵀ - delta) · store dS · wait for the other's dS ········ add dQ to memory
    tensor cores   dPᵀ(t) ·························· dV(t) ··· dK(t) ······················ dQ(t) · Sᵀ(t+1) ··········

Shared memory holds dS twice: who has stored its dS(t) has multiplied all of dS(t-1). The loader leaves two integers
beside every tile of queries, which say where it is and whether the mask cuts it, and beside the keys which they are.
Barriers: `*_full` say that the loader's bytes are there, `*empty` that both warpgroups have read them, `scores_full`
that both have stored a dS, `keys_done` that both have multiplied their last one with these keys.
Shapes: M queries and N keys of a tile, H = N / 2, D head and E value dimension padded to a power of two.
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
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, places, work, counter, barriers,
    h, group, m, m_padded, mask_low, mask_high, stop, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Fetch what both warpgroups read."""
    k_full, v_full, kv_empty, q_full, d_out_full, empty, _scores_full, _keys_done = barriers
    H: gl.constexpr = N // 2
    SIZE: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    items = key_tiles * (h // group) * batches
    item = gl.program_id(0)
    turn = 0
    step = 0
    while item < items:
        side = 0
        if PERSISTENT:
            side = turn & 1
        tile, key_head, batch = assignment(item, key_tiles, h // group, batches, together)
        mbarrier.wait(kv_empty.index(side), (turn // 2 & 1) ^ 1)
        write_number(work.index(side), item, 1)
        mbarrier.expect(k_full.index(side), N * D * SIZE)
        for half in gl.static_range(2):
            load_tile(k, [batch, key_head, tile * N + half * H, 0], k_full.index(side), k_tiles.index(2 * side + half))
        mbarrier.expect(v_full.index(side), N * E * SIZE)
        for half in gl.static_range(2):
            load_tile(v, [batch, key_head, tile * N + half * H, 0], v_full.index(side), v_tiles.index(2 * side + half))
        if PERSISTENT:
            item = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        else:
            item = items
        turn += 1
        low, high, full_low, full_high, head_low, head_high = sight_of_tile(
            tile, batch, m, mask_low, mask_high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP
        )
        steps = (high - low + head_high - head_low) // M * group
        start = low
        if KEEP and low == high:
            start = head_low
        head = key_head * group
        for _step in range(steps):
            stage = step % STAGES
            line = batch * h + head
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            cut = gl.where((start < full_low) | (start >= full_high), 1, 0)
            write_number(places.index(2 * stage), line * m_padded + start, 1)
            write_number(places.index(2 * stage + 1), 2 * start + cut, 1)
            mbarrier.expect(q_full.index(stage), M * D * SIZE + M * 4)
            load_tile(q, [batch, head, start, 0], q_full.index(stage), q_tiles.index(stage))
            load_tile(lse_two, [line, start], q_full.index(stage), lse_tiles.index(stage))
            mbarrier.expect(d_out_full.index(stage), M * E * SIZE + M * 4)
            load_tile(d_out, [batch, head, start, 0], d_out_full.index(stage), d_out_tiles.index(stage))
            load_tile(delta, [line, start], d_out_full.index(stage), delta_tiles.index(stage))
            start, head = advance(start, head, low, high, head_low, head_high, 1, M, KEEP)
            step += 1
    if PERSISTENT:
        side = turn & 1
        mbarrier.wait(kv_empty.index(side), (turn // 2 & 1) ^ 1)
        write_number(work.index(side), -1, 1)
        mbarrier.arrive(k_full.index(side), count=1)


@gluon.jit
def multiply_queries(
    w: gl.constexpr, slot, nil, score_tiles, k_tiles,
    D: gl.constexpr, H: gl.constexpr, BY_ROWS: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Issue this warpgroup's part of ``dQ = dS K``: half of its rows, or half of its columns."""
    d_query = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    for half in gl.static_range(2):
        d_score = score_tiles.index(slot * 2 + half)
        key = k_tiles.index(half + nil).reshape([H, D])
        if BY_ROWS:
            d_score = d_score.slice(w * ROWS, ROWS, dim=1)
        else:
            key = key.slice(w * COLUMNS, COLUMNS, dim=1)
        d_query = warpgroup_mma(d_score.permute((1, 0)), key, d_query, use_acc=half > 0, is_async=True)
    return d_query


@gluon.jit
def absorb_partition(
    w: gl.constexpr, sums, dk, dv, alibi, rows, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, places, work, barriers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
    scale, inner, outer, full_scale, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Sum dk and dv of this warpgroup's half of the keys, and add its part of every dq."""
    k_full, v_full, kv_empty, q_full, d_out_full, empty, scores_full, keys_done = barriers
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

    turn = 0
    step = 0
    mbarrier.wait(k_full.index(0), 0)
    item = read_number(work.index(0), 4)
    while item >= 0:
        tile, key_head, batch = assignment(item, key_tiles, h // group, batches, together)
        steps = group * count_tiles(
            tile, batch, m, low, high, stop, sequences, seers, key_tiles, M, N, ROWS, EACH, KEEP
        )
        first_key = tile * N + w * H
        side = 0
        if PERSISTENT:
            side = turn & 1
        key = k_tiles.index(2 * side + w).reshape([H, D])
        value = v_tiles.index(2 * side + w).reshape([H, E])
        dk_sum = gl.zeros([H, D], gl.float32, KEY)
        dv_sum = gl.zeros([H, E], gl.float32, VALUE)
        nothing = gl.zeros([H, M], gl.float32, SCORE)
        j = first_key + gl.arange(0, H, gl.SliceLayout(1, SCORE))
        mbarrier.wait(v_full.index(side), turn // 2 & 1)
        if DEAD:
            without_dead(key, dtype)
            without_dead(value, dtype)
            fence_async_shared()
            barrier()
        if steps > 0:
            mbarrier.wait(q_full.index(step % STAGES), step // STAGES & 1)
        score = warpgroup_mma(
            key, q_tiles.index(step % STAGES).reshape([M, D]).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        score = warpgroup_mma_wait(0, deps=(score,))  # [H, M]
        last = step + steps
        while step < last:
            stage = step % STAGES
            row = read_number(places.index(2 * stage), 4)
            place = read_number(places.index(2 * stage + 1), 4)
            start = place // 2
            # Always 0, which the compiler cannot know: it would keep the address of every piece of K in registers.
            nil = place >> 31
            query = q_tiles.index(stage).reshape([M, D])
            gradient = d_out_tiles.index(stage).reshape([M, E])
            again = value
            if ROWS or SOFTCAP or ALIBI:
                again = v_tiles.index(2 * side + w + nil).reshape([H, E])
            mbarrier.wait(d_out_full.index(stage), step // STAGES & 1)
            d_weight = warpgroup_mma(
                again, gradient.permute((1, 0)), nothing, use_acc=False, is_async=True,
            )  # fmt: skip
            if SOFTCAP:
                tanh = 1.0 - 2.0 / (1.0 + gl.exp2(score * inner))
                score = outer * tanh
            else:
                score = score * scale
            i = start + gl.arange(0, M, gl.SliceLayout(0, SCORE))
            if ALIBI:
                at = batch * alibi_b + row // m_padded - batch * h
                score = penalised(score, i, j, m, batch, alibi, at, position, rows, rows_size, sequences, ROWS, EACH)
            if place & 1 == 1:
                score = masked(
                    score, i, j, m, batch, low, high, stop, keep, rows, rows_size, sequences, ROWS, EACH, KEEP
                )
            weight = gl.exp2(score - lse_tiles.index(stage).load(SCORE))
            weight_left = gl.convert_layout(weight.to(dtype), LEFT_OF_VALUE)
            if SOFTCAP:
                weight = weight * (1.0 - tanh * tanh)
            flow = delta_tiles.index(stage).load(SCORE)
            d_weight = warpgroup_mma_wait(0, deps=(d_weight,))  # [H, M]
            d_score = (weight * (d_weight - flow)).to(dtype)
            dv_sum = warpgroup_mma(weight_left, gradient, dv_sum, is_async=True)
            if ADD:
                # The other warpgroup has multiplied what was here two steps ago: it arrived one step ago.
                score_tiles.index((step & 1) * 2 + w).store(d_score)
                fence_async_shared()
                mbarrier.arrive(scores_full, count=1)
            dk_sum = warpgroup_mma(gl.convert_layout(d_score, LEFT_OF_KEY), query, dk_sum, is_async=True)
            if ADD:
                mbarrier.wait(scores_full, step & 1)
                dq_part = multiply_queries(
                    w, step & 1, 2 * side + nil, score_tiles, k_tiles, D, H, BY_ROWS, DQ_ROWS, DQ_COLUMNS, QUERY
                )
                dv_sum, dk_sum = warpgroup_mma_wait(2, deps=(dv_sum, dk_sum))
            else:
                dv_sum, dk_sum = warpgroup_mma_wait(0, deps=(dv_sum, dk_sum))
            mbarrier.arrive(empty.index(stage), count=1)
            after = (step + 1) % STAGES
            # The next scores, or after the last step those of a tile long gone, which nobody reads.
            if step + 1 < last:
                mbarrier.wait(q_full.index(after), (step + 1) // STAGES & 1)
            score = warpgroup_mma(
                k_tiles.index(2 * side + w + nil).reshape([H, D]),
                q_tiles.index(after).reshape([M, D]).permute((1, 0)), nothing, use_acc=False, is_async=True,
            )  # fmt: skip
            if ADD:
                dq_part = warpgroup_mma_wait(1, deps=(dq_part,))
                add_queries(sums + row.to(gl.int64) * D + w * (DQ_ROWS * DQ_COLUMNS), dq_part, DQ_COLUMNS)
            score = warpgroup_mma_wait(0, deps=(score,))  # [H, M]
            step += 1

        if ADD:
            # Both warpgroups read all keys for dQ, and they make room for dK when neither does any more.
            mbarrier.arrive(keys_done, count=1)
            mbarrier.wait(keys_done, turn & 1)
        value.store(dv_sum.to(dtype))
        key.store((dk_sum * full_scale).to(dtype))
        fence_async_shared()
        store_tile(dv, [batch, key_head, first_key, 0], v_tiles.index(2 * side + w))
        store_tile(dk, [batch, key_head, first_key, 0], k_tiles.index(2 * side + w))
        store_wait(0)
        if PERSISTENT:
            mbarrier.arrive(kv_empty.index(side), count=1)
            turn += 1
            mbarrier.wait(k_full.index(turn & 1), turn // 2 & 1)
            item = read_number(work.index(turn & 1), 4)
        else:
            item = -1


@gluon.jit(
    do_not_specialize=[
        "alibi_b", "h", "group", "m", "m_padded", "low", "high", "stop", "position", "keep", "rows_size",
        "key_tiles", "batches", "together",
    ]
)  # fmt: skip
def backward_kernel(
    q, k, v, d_out, lse_two, delta, sums, dk, dv, alibi, rows, sequences, seers, counter,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer, full_scale,
    key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Hand out shared memory, barriers and roles."""
    H: gl.constexpr = N // 2
    SIDES: gl.constexpr = 2 if PERSISTENT else 1
    dtype: gl.constexpr = q.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], q.layout)
    d_out_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, E], d_out.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [2 * SIDES, 1, 1, H, D], k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2 * SIDES, 1, 1, H, E], v.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_two.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta.layout)
    if ADD:
        score_tiles = gl.allocate_shared_memory(dtype, [4, H, M], gl.NVMMASharedLayout(128, 16, 2))
    else:
        score_tiles = k_tiles
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    work = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    keys_done = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    scores_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    d_out_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for side in gl.static_range(2):
        mbarrier.init(k_full.index(side), count=1)
        mbarrier.init(v_full.index(side), count=1)
        mbarrier.init(kv_empty.index(side), count=2)
    mbarrier.init(keys_done, count=2)
    mbarrier.init(scores_full, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(d_out_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    barriers = (k_full, v_full, kv_empty, q_full, d_out_full, empty, scores_full, keys_done)
    w0: gl.constexpr = 0
    w1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (absorb_partition, (
                w0, sums, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, places, work, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD, PERSISTENT,
            )),
            (absorb_partition, (
                w1, sums, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, places, work, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD, PERSISTENT,
            )),
            (load_partition, (
                q, k, v, d_out, lse_two, delta, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, places, work, counter, barriers,
                h, group, m, m_padded, low, high, stop, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, PERSISTENT,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
