# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# ruff: noqa: C901, PLR0912, PLR0915 - a loop that keeps the tensor cores busy is one function
"""FlashAttention backward for sm_90 (Dao 2023, arXiv:2307.08691, Algorithm 2; Shah et al. 2024, arXiv:2407.08608, §3).

A block of threads takes N keys of one key head into shared memory, and walks over every tile of M queries that sees
them, of every query head of the group. With P the weights and delta = rowsum(dO ∘ O) - dLSE:

    Sᵀ = K Qᵀ    dPᵀ = V dOᵀ    dSᵀ = Pᵀ ∘ (dPᵀ - delta)    dV += Pᵀ dO    dK += dSᵀ Q    dQ += dS K

Scores are held transposed, so that Pᵀ and dSᵀ stay in the registers that their products read them from. dK and dV are
summed in registers too, over all heads of the group, and written once. dQ is summed in memory, in a float32 workspace:
what a tile of keys has to add goes there in the order in which the tensor cores left it, and
`backward_passes.finish_kernel` sorts, scales and rounds the sums.

Four kinds of warps share the work ("warp specialisation"):

    loader        one warp: keys and values, then Q, dO, log-sum-exp and delta of tile after tile into a ring of STAGES
                  buffers, as far ahead as there is room: if PERSISTENT, the next keys, too
    warpgroup 0   keys [0, N/2) of the tile: its half of Sᵀ, dPᵀ, dSᵀ, dK and dV; and one half of every dQ
    warpgroup 1   keys [N/2, N), and the other half of every dQ, for which each needs the dS of both
    adder         one warp, unless PERSISTENT: has the copy engine add to dQ what the warpgroups leave in shared memory.
                  When they add from registers, they stand still until memory has taken it, 32 bytes a cycle

The tensor cores work through what a warpgroup issues in order, while its threads go on. Tile t, for one warpgroup;
the other does the same, and its products fill the gaps:

    threads        exp2(Sᵀ) · Pᵀ ∘ (dPᵀ - delta) · store dS · wait for the other's dS ···· leave or add dQ · next tile
    tensor cores   dPᵀ(t) ··································· dV(t) ···················· dQ(t)  dK(t)  Sᵀ(t+1) ······

Shared memory holds dS twice: who has stored its dS(t) has multiplied all of dS(t-1). The loader leaves two integers
beside every tile of queries, which say where it is and whether the mask cuts it, and beside the keys which they are.
Barriers: `*_full` say that the bytes are there, `*empty` that they have been read, `scores_full` (two, in turn) that
both warpgroups have stored a dS, `keys_done` that both have multiplied their last one with these keys, `part_*` what
the warpgroups leave to the adder.
Shapes: M queries and N keys of a tile, H = N / 2, D head and E value dimension padded to a power of two.
"""

from .backward_scores import add_queries, by_fours, masked, penalised, read_number, without_dead, write_number
from .backward_tiles import advance, walk
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


@gluon.jit
def load_partition(
    q, k, v, d_out, lse_two, delta, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, places, work, counter, barriers,
    h, group, m, m_padded, mask_low, mask_high, stop, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Fetch what both warpgroups read."""
    k_full, v_full, kv_empty, q_full, d_out_full, empty, _scores_full, _keys_done, _part_full, _part_empty = barriers
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
        tile, key_head, batch, steps, start, low, high, full_low, full_high, head_low, head_high = walk(
            item, group, h, m, mask_low, mask_high, stop, sequences, seers, key_tiles, batches, together,
            M, N, ROWS, EACH, KEEP,
        )  # fmt: skip
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
def add_partition(
    sums, sequences, seers, part_tiles, barriers,
    h, group, m, m_padded, low, high, stop, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr,
    ADDER: gl.constexpr,
):  # fmt: skip
    """Add to dQ what the warpgroups leave: each a half of M · D numbers, in rows of 128."""
    _k_full, _v_full, _kv_empty, _q_full, _d_out_full, _empty, _scores_full, _keys_done, part_full, part_empty = (
        barriers
    )
    PART: gl.constexpr = M * D // 2 // 128
    _tile, key_head, batch, steps, start, low, high, _full_low, _full_high, head_low, head_high = walk(
        gl.program_id(0), group, h, m, low, high, stop, sequences, seers, key_tiles, batches, together,
        M, N, ROWS, EACH, KEEP,
    )  # fmt: skip
    line = batch * h + key_head * group
    if ADDER:
        for step in range(steps):
            row = (line * m_padded + start) // 64 * (64 * D // 128)
            for w in gl.static_range(2):
                mbarrier.wait(part_full.index(w), step & 1)
                add_tile(sums, [row + w * PART, 0], part_tiles.index(w))
            for w in gl.static_range(2):
                store_wait(1 - w)
                mbarrier.arrive(part_empty.index(w), count=1)
            start, line = advance(start, line, low, high, head_low, head_high, 1, M, KEEP)


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
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, part_tiles, places, work, barriers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
    scale, inner, outer, full_scale, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr, ADDER: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Sum dk and dv of this warpgroup's half of the keys, and compute its part of every dq."""
    k_full, v_full, kv_empty, q_full, d_out_full, empty, scores_full, keys_done, part_full, part_empty = barriers
    H: gl.constexpr = N // 2
    BY_ROWS: gl.constexpr = M == 128
    DQ_ROWS: gl.constexpr = M // 2 if BY_ROWS else M
    DQ_COLUMNS: gl.constexpr = D if BY_ROWS else D // 2
    # Where registers allow it: rows of 128 scores do not.
    LATE_MASK: gl.constexpr = M == 64
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
        tile, key_head, batch, steps, _start, _low, _high, _full_low, _full_high, _head_low, _head_high = walk(
            item, group, h, m, low, high, stop, sequences, seers, key_tiles, batches, together,
            M, N, ROWS, EACH, KEEP,
        )  # fmt: skip
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
            # Always 0, which the compiler cannot know: it would keep the address of every piece of K in registers.
            nil = place >> 31
            query = q_tiles.index(stage).reshape([M, D])
            gradient = d_out_tiles.index(stage).reshape([M, E])
            again = value
            if ROWS or SOFTCAP or ALIBI:
                again = v_tiles.index(2 * side + w + nil).reshape([H, E])
            mbarrier.wait(d_out_full.index(stage), step // STAGES & 1)
            d_weight = warpgroup_mma(again, gradient.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if SOFTCAP:
                tanh = 1.0 - 2.0 / (1.0 + gl.exp2(score * inner))
                score = outer * tanh
            else:
                score = score * scale
            i = place // 2 + gl.arange(0, M, gl.SliceLayout(0, SCORE))
            if ALIBI:
                at = batch * alibi_b + row // m_padded - batch * h
                score = penalised(score, i, j, m, batch, alibi, at, position, rows, rows_size, sequences, ROWS, EACH)
            if LATE_MASK:
                # Past a branch, ptxas does not put exp2 off until dP is there: so the mask is applied to weights.
                weight = gl.exp2(score - lse_tiles.index(stage).load(SCORE))
                if place & 1 == 1:
                    weight = masked(
                        weight, i, j, m, batch, low, high, stop, keep, rows, rows_size, sequences, 0.0, ROWS, EACH, KEEP
                    )
            else:
                if place & 1 == 1:
                    score = masked(
                        score, i, j, m, batch, low, high, stop, keep, rows, rows_size, sequences, float("-inf"),
                        ROWS, EACH, KEEP,
                    )  # fmt: skip
                weight = gl.exp2(score - lse_tiles.index(stage).load(SCORE))
            flow = delta_tiles.index(stage).load(SCORE)
            weight_left = gl.convert_layout(weight.to(dtype), LEFT_OF_VALUE)
            if SOFTCAP:
                weight = weight * (1.0 - tanh * tanh)
            d_weight = warpgroup_mma_wait(0, deps=(d_weight,))  # [H, M]
            d_score = (weight * (d_weight - flow)).to(dtype)
            # First or second, as spills fewer registers.
            if not BY_ROWS:
                dv_sum = warpgroup_mma(weight_left, gradient, dv_sum, is_async=True)
            if ADD:
                # The other warpgroup has multiplied what was here two steps ago: it arrived one step ago.
                score_tiles.index((step & 1) * 2 + w).store(d_score)
                fence_async_shared()
                mbarrier.arrive(scores_full.index(step & 1), count=1)
            if BY_ROWS:
                dv_sum = warpgroup_mma(weight_left, gradient, dv_sum, is_async=True)
            if ADD:
                mbarrier.wait(scores_full.index(step & 1), step // 2 & 1)
                dq_part = multiply_queries(
                    w, step & 1, 2 * side + nil, score_tiles, k_tiles, D, H, BY_ROWS, DQ_ROWS, DQ_COLUMNS, QUERY
                )
            dk_sum = warpgroup_mma(gl.convert_layout(d_score, LEFT_OF_KEY), query, dk_sum, is_async=True)
            if ADD:
                dv_sum, dq_part = warpgroup_mma_wait(1, deps=(dv_sum, dq_part))
            if ADDER:
                mbarrier.wait(part_empty.index(w), (step & 1) ^ 1)
                part_tiles.index(w).store(gl.reshape(by_fours(dq_part, DQ_COLUMNS), [M * D // 256, 128]))
                fence_async_shared()
                mbarrier.arrive(part_full.index(w), count=1)
            after = (step + 1) % STAGES
            # The next scores, or after the last step those of a tile long gone, which nobody reads.
            if step + 1 < last:
                mbarrier.wait(q_full.index(after), (step + 1) // STAGES & 1)
            score = warpgroup_mma(
                k_tiles.index(2 * side + w + nil).reshape([H, D]),
                q_tiles.index(after).reshape([M, D]).permute((1, 0)), nothing, use_acc=False, is_async=True,
            )  # fmt: skip
            if ADD and not ADDER:
                # Long since true, but a branch, before which ptxas issues all of the products.
                mbarrier.wait(d_out_full.index(stage), step // STAGES & 1)
                add_queries(sums + row.to(gl.int64) * D + w * (DQ_ROWS * DQ_COLUMNS), dq_part, DQ_COLUMNS)
            dv_sum, dk_sum = warpgroup_mma_wait(1, deps=(dv_sum, dk_sum))
            mbarrier.arrive(empty.index(stage), count=1)
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
    ADDER: gl.constexpr = ADD and not PERSISTENT
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
    if ADDER:
        part_tiles = gl.allocate_shared_memory(gl.float32, [2, M * D // 256, 128], sums.layout)
    else:
        part_tiles = k_tiles
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    work = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    keys_done = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    scores_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    part_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    part_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    d_out_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(keys_done, count=2)
    for side in gl.static_range(2):
        mbarrier.init(k_full.index(side), count=1)
        mbarrier.init(v_full.index(side), count=1)
        mbarrier.init(kv_empty.index(side), count=2)
        mbarrier.init(scores_full.index(side), count=2)
        mbarrier.init(part_full.index(side), count=1)
        mbarrier.init(part_empty.index(side), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(d_out_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    barriers = (
        k_full, v_full, kv_empty, q_full, d_out_full, empty, scores_full, keys_done, part_full, part_empty,
    )  # fmt: skip
    w0: gl.constexpr = 0
    w1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (absorb_partition, (
                w0, sums, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, part_tiles, places, work,
                barriers, alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD, ADDER, PERSISTENT,
            )),
            (absorb_partition, (
                w1, sums, dk, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, score_tiles, part_tiles, places, work,
                barriers, alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size,
                scale, inner, outer, full_scale, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD, ADDER, PERSISTENT,
            )),
            (load_partition, (
                q, k, v, d_out, lse_two, delta, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, delta_tiles, places, work, counter, barriers,
                h, group, m, m_padded, low, high, stop, key_tiles, batches, together,
                M, N, D, E, STAGES, ROWS, EACH, KEEP, PERSISTENT,
            )),
            (add_partition, (
                sums, sequences, seers, part_tiles, barriers,
                h, group, m, m_padded, low, high, stop, key_tiles, batches, together,
                M, N, D, ROWS, EACH, KEEP, ADDER,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
