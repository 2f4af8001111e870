# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# ruff: noqa: C901, PLR0912, PLR0915, SIM102 - a loop that keeps the tensor cores busy is one function
"""`backward_kernel` for heads wider than 128, whose dK and dV are too wide for one warpgroup's registers.

Here both warpgroups have the same 64 keys, and one sums dV, the other dK. Each computes what its sum is made of, and
hands on what the other needs, so that nothing is computed twice:

    warpgroup 0   Sᵀ = K Qᵀ, Pᵀ = exp2(Sᵀ), which it leaves to the other, dV += Pᵀ dO, left half of dQ(t-1) += dS(t-1) K
    warpgroup 1   dPᵀ = V dOᵀ, dSᵀ = Pᵀ ∘ (dPᵀ - delta), which it leaves to the other, dK += dSᵀ Q, right half of dQ(t)

    threads 0        exp2(Sᵀ) · leave P ············· add quarter 1 of dQ(t-1) ·········· add quarter 2 ··· next tile
    tensor cores                        dV(t) quarter 1 ···················· quarter 2  Sᵀ(t+1) ·
    threads 1        wait for P · leave dS ········· add quarter 3 of dQ(t) ············ add quarter 4 ··· next tile
    tensor cores                        quarter 3  dK(t) ·················· quarter 4  dPᵀ(t+1)

P stays in float32 and in the order in which it lies in registers: the other's numbers lie likewise. dS lies twice in
shared memory, since warpgroup 0 multiplies it one tile later. dQ goes to memory from registers, quarter by quarter:
shared memory is full. Every matrix lies there as two halves of columns.
Barriers beside those of `backward_kernel`: `weights_*` for P, `both` for that both are done with the keys and values.
Shapes: M = N = 64 queries and keys of a tile, C = D / 2 columns of q and k, F = E / 2 of v and dO.
"""

from .backward_scores import (
    add_queries,
    by_fours,
    from_fours,
    masked,
    penalised,
    read_number,
    without_dead,
    write_number,
)
from .backward_tiles import advance, walk
from .gluon import (
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
    kv_full, q_full, d_out_full, empty, _both, _weights_full, _weights_empty, _scores_full, _scores_empty = barriers
    SIZE: gl.constexpr = q_tiles.dtype.primitive_bitwidth // 8
    tile, key_head, batch, steps, start, low, high, full_low, full_high, head_low, head_high = walk(
        gl.program_id(0), group, h, m, low, high, stop, sequences, seers, key_tiles, batches, together,
        M, N, ROWS, EACH, KEEP,
    )  # fmt: skip
    mbarrier.expect(kv_full, 2 * N * (C + F) * SIZE)
    for half in gl.static_range(2):
        load_tile(k, [batch, key_head, tile * N, half * C], kv_full, k_tiles.index(half))
        load_tile(v, [batch, key_head, tile * N, half * F], kv_full, v_tiles.index(half))
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
def value_partition(
    sums, dv, alibi, rows, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, score_tiles, weight_tile, places, barriers,
    alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer,
    key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    DEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Compute weights, sum dv, and add the left half of every dq, one tile late."""
    kv_full, q_full, d_out_full, empty, both, weights_full, weights_empty, scores_full, scores_empty = barriers
    dtype: gl.constexpr = q_tiles.dtype
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    VALUE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    QUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C // 2, 16])
    LEFT_OF_VALUE: gl.constexpr = gl.DotOperandLayout(0, VALUE, 2)
    tile, key_head, batch, steps, _start, _low, _high, _full_low, _full_high, _head_low, _head_high = walk(
        gl.program_id(0), group, h, m, low, high, stop, sequences, seers, key_tiles, batches, together,
        M, N, ROWS, EACH, KEEP,
    )  # fmt: skip
    j = tile * N + gl.arange(0, N, gl.SliceLayout(1, SCORE))
    left_sum = gl.zeros([N, F], gl.float32, VALUE)
    right_sum = gl.zeros([N, F], gl.float32, VALUE)
    mbarrier.wait(kv_full, 0)
    if DEAD:
        for half in gl.static_range(2):
            without_dead(k_tiles.index(half).reshape([N, C]), dtype)
        fence_async_shared()
        mbarrier.arrive(both, count=1)
        mbarrier.wait(both, 0)
    if steps > 0:
        mbarrier.wait(q_full.index(0), 0)
    score = multiply_halves(k_tiles, 0, q_tiles, 0, N, M, C, SCORE)
    score = warpgroup_mma_wait(0, deps=(score,))  # [N, M]
    row_before = 0
    for step in range(steps):
        stage = step % STAGES
        row = read_number(places.index(2 * stage), 4)
        place = read_number(places.index(2 * stage + 1), 4)
        # Always 0, which the compiler cannot know: it would keep the address of every piece of K in registers.
        nil = place >> 31
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
            score = masked(
                score, i, j, m, batch, low, high, stop, keep, rows, rows_size, sequences, float("-inf"),
                ROWS, EACH, KEEP,
            )  # fmt: skip
        weight = gl.exp2(score - lse_tiles.index(stage).load(SCORE))
        weight_left = gl.convert_layout(weight.to(dtype), LEFT_OF_VALUE)
        if SOFTCAP:
            weight = weight * (1.0 - tanh * tanh)
        mbarrier.wait(weights_empty, (step & 1) ^ 1)
        weight_tile.store(by_fours(weight, M))
        mbarrier.arrive(weights_full, count=1)
        mbarrier.wait(d_out_full.index(stage), step // STAGES & 1)
        left_sum = warpgroup_mma(weight_left, d_out_tiles.index(2 * stage).reshape([M, F]), left_sum, is_async=True)
        right_sum = warpgroup_mma(
            weight_left, d_out_tiles.index(2 * stage + 1).reshape([M, F]), right_sum, is_async=True
        )
        after = (step + 1) % STAGES
        # Of the tile before; in the first step of scores that nobody left, for nothing.
        slot = (step + 1) & 1
        if ADD:
            at = sums + row_before.to(gl.int64) * (2 * C)
            row_before = row
            if step > 0:
                mbarrier.wait(scores_full.index(slot), (step - 1) // 2 & 1)
            part = multiply_quarter(nil, 0, score_tiles.index(slot), k_tiles, N, M, C, QUERY)
            left_sum, right_sum, part = warpgroup_mma_wait(0, deps=(left_sum, right_sum, part))
        else:
            left_sum, right_sum = warpgroup_mma_wait(0, deps=(left_sum, right_sum))
        mbarrier.arrive(empty.index(stage), count=1)
        if ADD:
            if step > 0:
                add_queries(at, part, C // 2)
        if step + 1 < steps:
            mbarrier.wait(q_full.index(after), (step + 1) // STAGES & 1)
        if ADD:
            part = multiply_quarter(nil, 1, score_tiles.index(slot), k_tiles, N, M, C, QUERY)
        # The next scores, or after the last step those of a tile long gone, which nobody reads.
        score = multiply_halves(k_tiles, nil, q_tiles, 2 * after, N, M, C, SCORE)
        if ADD:
            part = warpgroup_mma_wait(2, deps=(part,))
            if step > 0:
                add_queries(at + M * C // 2, part, C // 2)
                mbarrier.arrive(scores_empty.index(slot), count=1)
        score = warpgroup_mma_wait(0, deps=(score,))
    if ADD:
        if steps > 0:
            slot = (steps + 1) & 1
            at = sums + row_before.to(gl.int64) * (2 * C)
            for quarter in gl.static_range(2):
                mbarrier.wait(scores_full.index(slot), (steps - 1) // 2 & 1)
                part = multiply_quarter(0, quarter, score_tiles.index(slot), k_tiles, N, M, C, QUERY)
                part = warpgroup_mma_wait(0, deps=(part,))
                add_queries(at + quarter * (M * C // 2), part, C // 2)
    # Both warpgroups read keys and values, and make room for dK and dV when neither does any more.
    mbarrier.arrive(both, count=1)
    mbarrier.wait(both, 1 if DEAD else 0)
    v_tiles.index(0).reshape([N, F]).store(left_sum.to(dtype))
    v_tiles.index(1).reshape([N, F]).store(right_sum.to(dtype))
    fence_async_shared()
    for half in gl.static_range(2):
        store_tile(dv, [batch, key_head, tile * N, half * F], v_tiles.index(half))
    store_wait(0)


@gluon.jit
def key_partition(
    sums, dk, sequences, seers,
    q_tiles, d_out_tiles, k_tiles, v_tiles, delta_tiles, score_tiles, weight_tile, places, barriers,
    h, group, m, low, high, stop, full_scale, key_tiles, batches, together,
    M: gl.constexpr, N: gl.constexpr, C: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, EACH: gl.constexpr, KEEP: gl.constexpr, DEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of scores, sum dk, and add the right half of every dq."""
    kv_full, q_full, d_out_full, empty, both, weights_full, weights_empty, scores_full, scores_empty = barriers
    dtype: gl.constexpr = q_tiles.dtype
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    KEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    QUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C // 2, 16])
    LEFT_OF_KEY: gl.constexpr = gl.DotOperandLayout(0, KEY, 2)
    tile, key_head, batch, steps, _start, _low, _high, _full_low, _full_high, _head_low, _head_high = walk(
        gl.program_id(0), group, h, m, low, high, stop, sequences, seers, key_tiles, batches, together,
        M, N, ROWS, EACH, KEEP,
    )  # fmt: skip
    left_sum = gl.zeros([N, C], gl.float32, KEY)
    right_sum = gl.zeros([N, C], gl.float32, KEY)
    mbarrier.wait(kv_full, 0)
    if DEAD:
        for half in gl.static_range(2):
            without_dead(v_tiles.index(half).reshape([N, F]), dtype)
        fence_async_shared()
        mbarrier.arrive(both, count=1)
        mbarrier.wait(both, 0)
    if steps > 0:
        mbarrier.wait(d_out_full.index(0), 0)
    d_weight = multiply_halves(v_tiles, 0, d_out_tiles, 0, N, M, F, SCORE)
    d_weight = warpgroup_mma_wait(0, deps=(d_weight,))  # [N, M]
    for step in range(steps):
        stage = step % STAGES
        slot = step & 1
        phase = step // 2 & 1
        mbarrier.wait(q_full.index(stage), step // STAGES & 1)
        row = read_number(places.index(2 * stage), 4)
        # Always 0, which the compiler cannot know: it would keep the address of every piece of V in registers.
        nil = row >> 31
        d_weight = d_weight - delta_tiles.index(stage).load(SCORE)
        mbarrier.wait(weights_full, step & 1)
        weight = from_fours(weight_tile, M, SCORE)
        mbarrier.arrive(weights_empty, count=1)
        d_score = (weight * d_weight).to(dtype)
        if ADD:
            mbarrier.wait(scores_empty.index(slot), phase ^ 1)
            score_tiles.index(slot).store(d_score)
            fence_async_shared()
            mbarrier.arrive(scores_full.index(slot), count=1)
            mbarrier.wait(scores_full.index(slot), phase)
            part = multiply_quarter(1 + nil, 0, score_tiles.index(slot), k_tiles, N, M, C, QUERY)
        d_score_left = gl.convert_layout(d_score, LEFT_OF_KEY)
        left_sum = warpgroup_mma(d_score_left, q_tiles.index(2 * stage).reshape([M, C]), left_sum, is_async=True)
        right_sum = warpgroup_mma(d_score_left, q_tiles.index(2 * stage + 1).reshape([M, C]), right_sum, is_async=True)
        after = (step + 1) % STAGES
        if ADD:
            part = warpgroup_mma_wait(2, deps=(part,))
            at = sums + row.to(gl.int64) * (2 * C) + M * C
            add_queries(at, part, C // 2)
        if step + 1 < steps:
            mbarrier.wait(d_out_full.index(after), (step + 1) // STAGES & 1)
        if ADD:
            part = multiply_quarter(1 + nil, 1, score_tiles.index(slot), k_tiles, N, M, C, QUERY)
        # Of the next scores, or after the last step of a tile long gone, which nobody reads.
        d_weight = multiply_halves(v_tiles, nil, d_out_tiles, 2 * after, N, M, F, SCORE)
        if ADD:
            left_sum, right_sum = warpgroup_mma_wait(3, deps=(left_sum, right_sum))
        else:
            left_sum, right_sum = warpgroup_mma_wait(2, deps=(left_sum, right_sum))
        mbarrier.arrive(empty.index(stage), count=1)
        if ADD:
            part = warpgroup_mma_wait(2, deps=(part,))
            add_queries(at + M * C // 2, part, C // 2)
        d_weight = warpgroup_mma_wait(0, deps=(d_weight,))
    mbarrier.arrive(both, count=1)
    mbarrier.wait(both, 1 if DEAD else 0)
    k_tiles.index(0).reshape([N, C]).store((left_sum * full_scale).to(dtype))
    k_tiles.index(1).reshape([N, C]).store((right_sum * full_scale).to(dtype))
    fence_async_shared()
    for half in gl.static_range(2):
        store_tile(dk, [batch, key_head, tile * N, half * C], k_tiles.index(half))
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
    weight_tile = gl.allocate_shared_memory(gl.float32, [M // 8, 512], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    both = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    weights_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    weights_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    scores_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    scores_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    d_out_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(both, count=2)
    mbarrier.init(weights_full, count=1)
    mbarrier.init(weights_empty, count=1)
    for slot in gl.static_range(2):
        mbarrier.init(scores_full.index(slot), count=1)
        mbarrier.init(scores_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(d_out_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    barriers = (kv_full, q_full, d_out_full, empty, both, weights_full, weights_empty, scores_full, scores_empty)
    gl.warp_specialize(
        [
            (value_partition, (
                sums, dv, alibi, rows, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, lse_tiles, score_tiles, weight_tile, places, barriers,
                alibi_b, h, group, m, m_padded, low, high, stop, position, keep, rows_size, scale, inner, outer,
                key_tiles, batches, together,
                M, N, C, F, STAGES, ROWS, EACH, KEEP, SOFTCAP, ALIBI, DEAD, ADD,
            )),
            (key_partition, (
                sums, dk, sequences, seers,
                q_tiles, d_out_tiles, k_tiles, v_tiles, delta_tiles, score_tiles, weight_tile, places, barriers,
                h, group, m, low, high, stop, full_scale, key_tiles, batches, together,
                M, N, C, F, STAGES, ROWS, EACH, KEEP, DEAD, ADD,
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
