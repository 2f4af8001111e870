# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""FlashAttention forward for sm_90: one warp loads, two or three warpgroups compute (FlashAttention-3, arXiv:2407.08608).

The fold of `longspan.spec.tiled`, in base two, from the last tile of keys to the first. A program stays on its
multiprocessor and takes tile after tile of queries, W · M rows each, from a counter. Inside it W + 1 partitions run
their own code on their own warps and meet at barriers in shared memory only:

    loader       q | K0 | K1 V0 | K2 V1 | K3 V2 | …             TMA into a ring of STAGES tiles of K and of V
    warpgroup 0  S0 softmax | S1 ∥ P0·V0 … softmax | S2 ∥ P1·V1 … softmax | …           M = 64 queries
    warpgroup 1      S0 softmax | S1 ∥ P0·V0 … softmax | …                              the next 64

S = q·Kᵀ of one tile of keys and P·V of the tile before are given to the tensor cores together; they run while the
exponentials of this warpgroup wait for S alone, and while those of the other warpgroups run. P stays in registers:
the layout of an accumulator is that of an operand. A barrier ``full`` says that a tile has landed, ``empty`` that
every warpgroup is done with it; each is passed once per turn of the ring, so its phase is the parity of the turn.
A mask is arithmetic on whole tiles first (`tiles.keys_of`): tiles that nobody sees are not loaded, tiles that a
warpgroup sees whole are not masked.
Shapes: M queries of a warpgroup, N keys of a tile, D head and E value dimension padded to a power of two.
"""

import math
from functools import cache
from typing import Final

import torch
from torch import Tensor

from ..flash.launch import per_sequence
from .choices import Variant, variant
from .gluon import fence_async_shared, gl, gluon, load_tile, mbarrier, store_tile, store_wait, warpgroup_mma
from .gluon import barrier as meet
from .gluon import warpgroup_mma_wait as wait_for
from .launch import Call, describe
from .spans import spans
from .tiles import keys_of, place, within

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
LEAST: Final = 1e-37  # a scale of 0 would make NaN of a score of -inf; this one makes every other score 0 as well


@gluon.jit
def interval_of(batch, interval, sequences, C: gl.constexpr):
    """First key, end and stop of an affine mask as seen from row 0, and where that row stands among the keys."""
    low, high, stop, position, _ = interval
    if C.MASK == "each":
        low = gl.load(sequences + 4 * batch)
        high = gl.load(sequences + 4 * batch + 1)
        stop = gl.load(sequences + 4 * batch + 2)
        position = gl.load(sequences + 4 * batch + 3)
    return low, high, stop, position


@gluon.jit
def loaded(tile, batch, sizes, interval, sequences, plan, C: gl.constexpr):
    """Tiles of keys that a program loads for a tile of queries: ``first, last``, and those of the head's keys."""
    tiles, _, _, m, _ = sizes
    ROWS: gl.constexpr = C.W * C.M
    N: gl.constexpr = C.N
    if C.MASK == "rows":
        at = plan + (batch * tiles + tile) * 16
        first = gl.load(at)
        last = gl.load(at + 1)
        head_first = gl.load(at + 2)
        head_last = gl.load(at + 3)
    else:
        low, high, stop, _ = interval_of(batch, interval, sequences, C)
        first, last, _, _ = keys_of(tile * ROWS, m, low, high, stop, ROWS, N)
        head_first = first * 0
        head_last = head_first
    if C.MASK != "rows":
        last = max(last, first + 1)
    return first, last, head_first, head_last


@gluon.jit
def next_column(t, first, last, head_first, head_last, N: gl.constexpr):
    """Where the t-th tile of keys begins: from the last one down, then the head's."""
    tile = last - 1 - t
    if t >= last - first:
        tile = head_last - 1 - (t - (last - first))
    return tile * N


@gluon.jit
def turn(it, STAGES: gl.constexpr):
    """Slot of the ring, and parity of the turn, of the it-th tile of keys."""
    return it % STAGES, (it // STAGES) & 1


@gluon.jit
def produce(
    q, k, v, queries, keys, values, bars, mailbox, counter, plan, sequences, sizes, interval, total, C: gl.constexpr
):  # fmt: skip
    """The loader: queries of every tile, keys one tile ahead of values; and the next tile's number for everyone."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty = bars
    tiles, h, group, m, b = sizes
    W: gl.constexpr = C.W
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    STAGES: gl.constexpr = C.STAGES
    programs = gl.num_programs(0)
    index = gl.program_id(0)
    it = 0
    parity = 1
    while index < total:
        tile, head = place(index, tiles, b * h, C.HEADS, C.MASK != "none")
        batch = head // h
        head = head - batch * h
        first, last, head_first, head_last = loaded(tile, batch, sizes, interval, sequences, plan, C)
        count = last - first + head_last - head_first
        for w in gl.static_range(W):
            mbarrier.wait(q_empty.index(w), parity)
            mbarrier.expect(q_full.index(w), M * C.D * 2)
            load_tile(q, [batch, head, (tile * W + w) * M, 0], q_full.index(w), queries.index(w))
        column = next_column(0, first, last, head_first, head_last, N)
        slot, phase = turn(it, STAGES)
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), N * C.D * 2)
        load_tile(k, [batch, head // group, column, 0], k_full.index(slot), keys.index(slot))
        following = programs + index  # the end, if there is a program for every tile
        if total > programs:
            following = programs + gl.atomic_add(counter, 1, sem="relaxed")
        for t in range(1, count):
            before = column
            column = next_column(t, first, last, head_first, head_last, N)
            slot, phase = turn(it + 1, STAGES)
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), N * C.D * 2)
            load_tile(k, [batch, head // group, column, 0], k_full.index(slot), keys.index(slot))
            slot, phase = turn(it, STAGES)
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), N * C.E * 2)
            load_tile(v, [batch, head // group, before, 0], v_full.index(slot), values.index(slot))
            it += 1
        slot, phase = turn(it, STAGES)
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), N * C.E * 2)
        load_tile(v, [batch, head // group, column, 0], v_full.index(slot), values.index(slot))
        it += 1
        mbarrier.wait(next_empty, parity)
        mailbox.store(gl.full([1], following, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(next_full, count=1)
        parity ^= 1
        index = following


@gluon.jit
def skip(it, count, bars, STAGES: gl.constexpr):
    """Let tiles of keys pass that other warpgroups read and this one sees nothing of."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    for _ in range(count):
        slot, phase = turn(it, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
    return it


@gluon.jit
def weigh(s, peak, column, seen, factors, CUT: gl.constexpr, S: gl.constexpr, C: gl.constexpr):
    """Turn ``q · k`` [M, N] into weights under the new peak of every row: ``(p, peak, rescale)``."""
    first, last, base, keep, stands, slope = seen
    scale, inner, outer = factors
    N: gl.constexpr = C.N
    SCALED: gl.constexpr = C.SOFTCAP or C.BIASED
    j = gl.arange(0, N, gl.SliceLayout(0, S))[None, :]
    if C.SOFTCAP:
        # tanh x = 1 - 2 / (1 + exp 2x), which neither end overflows.
        s = outer * (1.0 - 2.0 / (1.0 + gl.exp2(s * inner)))
    if C.BIASED:
        if not C.SOFTCAP:
            s = s * scale
        s -= slope * gl.abs((stands - column).to(gl.float32)[:, None] - j.to(gl.float32))
    if CUT:
        hidden = j >= (last - column)[:, None]
        if C.LEFT:
            hidden = hidden | (j < (first - column)[:, None])
        if C.MASK == "rows":
            kept = (j >= (base - column)[:, None]) & (j < (gl.minimum(base + keep, last) - column)[:, None])
            hidden = hidden & (kept == 0)
        s = gl.where(hidden, float("-inf"), s)
    # A scale that is not negative commutes with the maximum and fuses with the subtraction.
    above = gl.max(s, axis=1)
    if not SCALED:
        above = above * scale
    above = gl.maximum(peak, above)
    finite = above
    if CUT:
        # A row that has seen no key yet has no peak; any finite one will do.
        finite = gl.where(above == float("-inf"), 0.0, above)
    if SCALED:
        p = gl.exp2(s - finite[:, None])
    else:
        p = gl.exp2(s * scale - finite[:, None])
    return p, above, gl.exp2(peak - finite)


@gluon.jit
def partial_sums(p, M: gl.constexpr, N: gl.constexpr, L: gl.constexpr):
    """Sum the weights that one thread holds of a row, without a word to other threads: [M, 8]."""
    return gl.convert_layout(gl.sum(gl.reshape(p, [M, N // 8, 8]), axis=1), L, assert_trivial=True)


@gluon.jit
def clean(value, C: gl.constexpr):
    """Zero what is not finite in a tile of values, in place: nobody sees it, and 0 · NaN is not 0.

    Called on cut tiles only. A key that some query sees must be finite, so only keys that none sees are changed; every
    warpgroup writes the same zeros before it multiplies.
    """
    N: gl.constexpr = C.N
    E: gl.constexpr = C.E
    SLICE: gl.constexpr = 1024 // E * 2
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    flat = value.reshape([N, E])
    found = gl.zeros([SLICE, E], gl.int32, L)
    for i in gl.static_range(N // SLICE):
        x = flat.slice(i * SLICE, SLICE).load(L)
        found = found | gl.where(gl.abs(x.to(gl.float32)) < float("inf"), 0, 1)
    if gl.max(gl.reshape(found, [SLICE * E]), axis=0) > 0:
        for i in gl.static_range(N // SLICE):
            x = flat.slice(i * SLICE, SLICE).load(L)
            finite = gl.abs(x.to(gl.float32)) < float("inf")
            flat.slice(i * SLICE, SLICE).store(gl.where(finite, x, gl.zeros([SLICE, E], x.dtype, L)))
        fence_async_shared()
    meet()


@gluon.jit
def absorb(
    acc, weight, sums, peak, it, column, query, keys, values, bars, zeros, seen, factors,
    CUT: gl.constexpr, S: gl.constexpr, O: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One step: scores of a tile of keys beside the values of the tile before it, then its weights."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    slot, phase = turn(it + 1, C.STAGES)
    slot_before, phase_before = turn(it, C.STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    key = keys.index(slot).reshape([N, C.D]).permute((1, 0))
    s = warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)  # [M, N]
    mbarrier.wait(v_full.index(slot_before), phase_before)
    value = values.index(slot_before).reshape([N, C.E])
    acc = warpgroup_mma(weight, value, acc, is_async=True)  # [M, E]
    s = wait_for(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, peak, rescale = weigh(s, peak, column, seen, factors, CUT, S, C)
    scale_sums = gl.convert_layout(rescale, gl.SliceLayout(1, EIGHTHS), assert_trivial=True)
    sums = sums * scale_sums[:, None] + partial_sums(p, M, N, EIGHTHS)
    acc = wait_for(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(slot_before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
    weight = gl.convert_layout(p.to(query.dtype), gl.DotOperandLayout(0, O, 2))
    if CUT and C.DEAD:
        mbarrier.wait(v_full.index(slot), phase)
        clean(values.index(slot), C)
    return acc, weight, sums, peak, it + 1


@gluon.jit
def bounds_of(row, batch, sizes, interval, rows, sequences, L: gl.constexpr, C: gl.constexpr):
    """First key, end, base and position of every row of a warpgroup: [M] each; 0 where the mask has no such thing."""
    _, _, _, m, b = sizes
    i = row + gl.arange(0, C.M, L)
    low, high, stop, position = interval_of(batch, interval, sequences, C)
    first = gl.maximum(i + low, 0)
    last = gl.minimum(i + high, stop)
    stands = i + position
    base = i
    if C.MASK == "rows":
        size = gl.cast(b, gl.int64) * m
        at = rows + gl.cast(batch, gl.int64) * m + i
        first = gl.load(at, mask=i < m, other=0)
        last = gl.load(at + size, mask=i < m, other=0)
        base = gl.load(at + 2 * size, mask=i < m, other=0)
        if C.BIASED:
            stands = gl.load(at + 3 * size, mask=i < m, other=0)
    return first, last, base, stands


@gluon.jit
def consume(
    w: gl.constexpr, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars, mailbox,
    sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: M queries of every tile."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty = bars
    tiles, h, _, m, b = sizes
    W: gl.constexpr = C.W
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    D: gl.constexpr = C.D
    E: gl.constexpr = C.E
    STAGES: gl.constexpr = C.STAGES
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    EIGHTHS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    DOWN: gl.constexpr = gl.SliceLayout(1, S)
    query = queries.index(w).reshape([M, D])
    zeros = gl.zeros([M, N], gl.float32, S)
    index = gl.program_id(0)
    it = 0
    parity = 0
    while index < total:
        tile, head = place(index, tiles, b * h, C.HEADS, C.MASK != "none")
        line = head
        batch = head // h
        head = head - batch * h
        row = (tile * W + w) * M
        first, last, head_first, head_last = loaded(tile, batch, sizes, interval, sequences, plan, C)
        count = last - first + head_last - head_first
        own_first = first
        own_last = last
        full_first = first
        full_last = last
        if C.MASK == "rows":
            at = plan + (batch * tiles + tile) * 16 + 4 + 4 * w
            own_first = gl.load(at)
            own_last = gl.load(at + 1)
            full_first = gl.load(at + 2)
            full_last = gl.load(at + 3)
        elif C.MASK != "none":
            low, high, stop, _ = interval_of(batch, interval, sequences, C)
            own_first, own_last, full_first, full_last = keys_of(row, m, low, high, stop, M, N)
            own_first, own_last, full_first, full_last = within(own_first, own_last, full_first, full_last, first, last)
        slope = 0.0
        if C.BIASED:
            slope = gl.load(alibi + batch * alibi_b + head, mask=slopes > 0, other=0.0) * LOG2_E
        row_first, row_last, base, stands = bounds_of(row, batch, sizes, interval, rows, sequences, DOWN, C)
        seen = (row_first, row_last, base, interval[4], stands, slope)

        passed = last - own_last
        if C.MASK != "none" and W > 1:
            it = skip(it, passed, bars, STAGES)
        # The first tile: nothing to rescale, no values before it.
        mbarrier.wait(q_full.index(w), parity)
        slot, phase = turn(it, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        key = keys.index(slot).reshape([N, D]).permute((1, 0))
        s = warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)
        s = wait_for(0, deps=(s,))
        mbarrier.arrive(k_empty.index(slot), count=1)
        column = next_column(passed, first, last, head_first, head_last, N)
        none = gl.full([M], float("-inf"), gl.float32, DOWN)
        p, peak, no_rescale = weigh(s, none, column, seen, factors, C.MASK != "none", S, C)
        sums = partial_sums(p, M, N, EIGHTHS)
        weight = gl.convert_layout(p.to(query.dtype), gl.DotOperandLayout(0, O, 2))
        acc = gl.zeros([M, E], gl.float32, O)
        if C.DEAD:
            mbarrier.wait(v_full.index(slot), phase)
            clean(values.index(slot), C)
        # Then the tiles that the mask cuts on the right, those seen whole, and those cut on the left; in tiles done.
        end = own_last - own_first + head_last - head_first
        if C.MASK != "none":
            right = max(own_last - full_last, 1)
            full = max(own_last - full_first, right)
            for t in range(1, right):
                acc, weight, sums, peak, it = absorb(
                    acc, weight, sums, peak, it, next_column(passed + t, first, last, head_first, head_last, N),
                    query, keys, values, bars, zeros, seen, factors, True, S, O, C,
                )  # fmt: skip
        else:
            right = 1
            full = end
        for t in range(right, full):
            acc, weight, sums, peak, it = absorb(
                acc, weight, sums, peak, it, (own_last - 1 - t) * N,
                query, keys, values, bars, zeros, seen, factors, False, S, O, C,
            )  # fmt: skip
        if C.LEFT:
            for t in range(full, end):
                acc, weight, sums, peak, it = absorb(
                    acc, weight, sums, peak, it, next_column(passed + t, first, last, head_first, head_last, N),
                    query, keys, values, bars, zeros, seen, factors, True, S, O, C,
                )  # fmt: skip
        if not C.REUSE:
            mbarrier.arrive(q_empty.index(w), count=1)
        slot, phase = turn(it, STAGES)
        mbarrier.wait(v_full.index(slot), phase)
        acc = warpgroup_mma(weight, values.index(slot).reshape([N, E]), acc, is_async=True)

        sum_of_all = gl.convert_layout(gl.sum(sums, axis=1), DOWN, assert_trivial=True)
        # A sink is a key of value zero, seen by every row; a score of -inf is none.
        score = gl.load(sink + batch * sink_b + head, mask=sinks > 0, other=float("-inf"))
        top = gl.maximum(peak, score * LOG2_E)
        finite = gl.where(top == float("-inf"), 0.0, top)
        shrink = gl.exp2(peak - finite)
        sum_of_all = sum_of_all * shrink + gl.exp2(score * LOG2_E - finite)
        empty = sum_of_all == 0.0
        inverse = gl.where(empty, 0.0, shrink / sum_of_all)
        log_sum = gl.where(empty, float("-inf"), (top + gl.log2(sum_of_all)) * LN_2)
        # A row without keys keeps the sink exactly, which log2 and back would round.
        log_sum = gl.where(peak == float("-inf"), score, log_sum)
        i = row + gl.arange(0, M, DOWN)
        gl.store(lse + gl.cast(line, gl.int64) * m + i, log_sum, mask=i < m)

        acc = wait_for(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O), assert_trivial=True)[:, None]
        if C.STAGED:
            rounded = acc.to(out.dtype)
            if C.REUSE:
                place_of = queries.index(w)
            else:
                place_of = outs.index(w)
                store_wait(0)
            place_of.reshape([M, E]).store(rounded)
            fence_async_shared()
            store_tile(out, [batch, head, row, 0], place_of)
            if C.REUSE:
                store_wait(0)
        else:
            down = row + gl.arange(0, M, gl.SliceLayout(1, O))
            across = gl.arange(0, E, gl.SliceLayout(0, O))
            at_out = out_at + gl.cast(line, gl.int64) * m * e + down.to(gl.int64)[:, None] * e + across[None, :]
            gl.store(at_out, acc.to(out_at.dtype.element_ty), mask=(down < m)[:, None] & (across < e)[None, :])
        if C.REUSE:
            mbarrier.arrive(q_empty.index(w), count=1)
        if C.MASK != "none" and W > 1:
            it = skip(it, count - passed - end, bars, STAGES)
        mbarrier.wait(next_full, parity)
        index = gl.sum(mailbox.load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
        mbarrier.arrive(next_empty, count=1)
        parity ^= 1
    store_wait(0)


@gluon.jit(do_not_specialize=["total", "tiles", "h", "group", "m", "b", "e", "low", "high", "stop", "position", "keep",
                              "sinks", "slopes", "sink_b", "alibi_b"])  # fmt: skip
def forward_kernel(
    q, k, v, out, out_at, lse, sink, alibi, rows, sequences, plan, counter,
    total, tiles, h, group, m, b, e, low, high, stop, position, keep, sinks, slopes, sink_b, alibi_b, scale, inner, outer,
    C: gl.constexpr,
):  # fmt: skip
    """Lay out shared memory and barriers, and set the partitions to work."""
    queries = gl.allocate_shared_memory(q.dtype, [C.W, 1, 1, C.M, C.D], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [C.STAGES, 1, 1, C.N, C.D], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [C.STAGES, 1, 1, C.N, C.E], v.layout)
    outs = queries
    if C.STAGED and not C.REUSE:
        outs = gl.allocate_shared_memory(out.dtype, [C.W, 1, 1, C.M, C.E], out.layout)
    ONE: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [C.W, 1], ONE)
    q_empty = gl.allocate_shared_memory(gl.int64, [C.W, 1], ONE)
    k_full = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], ONE)
    k_empty = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], ONE)
    v_full = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], ONE)
    v_empty = gl.allocate_shared_memory(gl.int64, [C.STAGES, 1], ONE)
    next_full = gl.allocate_shared_memory(gl.int64, [1], ONE)
    next_empty = gl.allocate_shared_memory(gl.int64, [1], ONE)
    mailbox = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    W: gl.constexpr = C.W
    STAGES: gl.constexpr = C.STAGES
    for i in gl.static_range(W):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=W)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=W)
    mbarrier.init(next_full, count=1)
    mbarrier.init(next_empty, count=W)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty)
    sizes = (tiles, h, group, m, b)
    interval = (low, high, stop, position, keep)
    factors = (scale, inner, outer)
    # What is passed on to warps of their own must be written out: a constant inside a tuple would become a variable.
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if W == 2:
        gl.warp_specialize([
            (consume, (zero, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (consume, (one, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (produce, (q, k, v, queries, keys, values, bars, mailbox, counter, plan, sequences, sizes, interval, total, C)),
        ], [4, 1], [C.REGISTERS, C.LOADER])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (zero, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (consume, (one, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (consume, (two, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (produce, (q, k, v, queries, keys, values, bars, mailbox, counter, plan, sequences, sizes, interval, total, C)),
        ], [4, 4, 1], [C.REGISTERS, C.REGISTERS, C.LOADER])  # fmt: skip


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: ``out [b, h, m, e]`` contiguous, and ``lse [b, h, m]`` float32."""
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    out = q.new_empty(b, h, m, e, dtype=call.out_dtype)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if n == 0:
        return blind(call, out, lse)
    form = variant(call, q, k, v)
    tiles = -(-m // (form.W * form.M))
    total = tiles * b * h
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    plan = lse if call.rows is None else spans(call, m, n, form.W, form.M, form.N)
    scale, inner, outer = factors_of(call, form)
    forward_kernel[(min(total, processors(q.device.index)),)](
        describe(q, form.M, form.D), describe(k, form.N, form.D), describe(v, form.N, form.E),
        describe(out, form.M, form.E) if form.STAGED else out,
        out, lse, lse if call.sink is None else call.sink.float(),
        lse if call.alibi is None else call.alibi.float(),
        lse if call.rows is None else call.rows, lse if call.sequences is None else call.sequences, plan, counter,
        total, tiles, h, h // g, m, b, e, *call.interval, call.sink is not None, call.alibi is not None,
        per_sequence(call.sink), per_sequence(call.alibi),
        scale, inner, outer, C=form, num_warps=4,
    )  # fmt: skip
    return out, lse


def factors_of(call: Call, form: Variant) -> tuple[float, float, float]:
    """``scale``, ``inner`` and ``outer`` of `weigh`: base two, and in the plain case more than 0."""
    scale, inner, outer = call.factors
    if form.SOFTCAP:
        return scale, inner, outer
    return (math.copysign(scale, call.scale) if form.BIASED else max(scale, LEAST)), inner, outer


def blind(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What there is to say where there are no keys."""
    none = -torch.inf if call.sink is None else call.sink.float()[..., None]
    return out.zero_(), lse.copy_(torch.as_tensor(none, device=lse.device).expand_as(lse))


@cache
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
