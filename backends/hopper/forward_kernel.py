# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
"""FlashAttention forward for sm_90: one warp loads, warpgroups compute (FlashAttention-3, arXiv:2407.08608).

The fold of `longspan.spec.tiled`, in base two, from the last tile of keys to the first. A program stays on its
multiprocessor and takes tile after tile of queries, W · M rows each, from a counter. Inside it W + 1 partitions run
their own code on their own warps and meet at barriers in shared memory only:

    loader       q | K0 | K1 V0 | K2 V1 | K3 V2 | …             TMA into a ring of STAGES tiles of K and of V
    warpgroup 0  S0 softmax | S1 ∥ P0·V0 … softmax | S2 ∥ P1·V1 … softmax | …           M = 64 queries
    warpgroup 1      S0 softmax | S1 ∥ P0·V0 … softmax | …                              the next 64

S = q·Kᵀ of one tile of keys and P·V of the tile before are given to the tensor cores together; they run while the
exponentials of this warpgroup wait for S alone, and while those of the other warpgroups run. P stays in registers:
the layout of an accumulator is that of an operand. So does q, where there are registers to spare. A barrier ``full``
says that a tile has landed, ``empty`` that every warpgroup is done with it; each is passed once per turn of the ring,
so its phase is the parity of the turn.
A mask is arithmetic on whole tiles first (`tiles.keys_of`): tiles that nobody sees are not loaded, tiles that a
warpgroup sees whole are not masked: one loop branches over the mask, or has none where only the first tile is cut.
Shapes: M queries of a warpgroup, N keys of a tile, D head and E value dimension padded to a power of two.
"""

from ..flash.plan import planned
from .gluon import barrier as meet
from .gluon import fence_async_shared, gl, gluon, load_tile, mbarrier, store_tile, store_wait, warpgroup_mma
from .gluon import warpgroup_mma_wait as wait_for
from .tiles import keys_of, place, within

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
LOWEST: gl.constexpr = gl.constexpr(-3.4028234663852886e38)  # of float32: the peak of a row that has seen no key


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
        head_first = first * 0
        head_last = head_first
        if C.KEEP:
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
def next_column(t, first, last, head_last, C: gl.constexpr):
    """Where the t-th tile of keys begins: from the last one down, then the head's."""
    tile = last - 1 - t
    if C.KEEP:  # noqa: SIM102 - known when it is compiled
        if t >= last - first:
            tile = head_last - 1 - (t - (last - first))
    return tile * C.N


@gluon.jit
def follow(column, t, first, last, head_last, C: gl.constexpr):
    """Where the t-th tile of keys begins, given where the one before it does."""
    if C.KEEP:
        column = next_column(t, first, last, head_last, C)
    else:
        column -= C.N
    return column


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
    tiles, h, group, _, b = sizes
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
        column = next_column(0, first, last, head_last, C)
        slot, phase = turn(it, STAGES)
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), N * C.D * 2)
        load_tile(k, [batch, head // group, column, 0], k_full.index(slot), keys.index(slot))
        following = programs + index  # the end, if there is a program for every tile
        if total > programs:
            following = programs + gl.atomic_add(counter, 1, sem="relaxed")
        for t in range(1, count):
            before = column
            column = next_column(t, first, last, head_last, C)
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
def weigh(s, peak, column, seen, factors, cut, CUT: gl.constexpr, C: gl.constexpr):
    """Turn ``q · k`` [M, N] into weights under the new peak of every row: ``(p, peak, rescale)``.

    Only ``cut`` tiles, if there are any (CUT), may hold keys that a row does not see. A peak is finite at all times, so
    that -inf less the peak is -inf, and a weight of 0.
    """
    first, last, base, kept, stands, slope = seen
    scale, inner, outer = factors
    SCALED: gl.constexpr = C.SOFTCAP or C.BIASED
    # A thread's columns are j + lane, with the same j, known when compiled, in all threads. Kept apart, j is part of
    # the instructions; as their sum, 32 numbers would stay in registers through every loop, and others be spilled.
    j = gl.arange(0, C.N, gl.SliceLayout(0, C.SCORES))[None, :]
    lane = column + (j & 6)
    j = j & ~6
    if C.SOFTCAP:
        # tanh x = 1 - 2 / (1 + exp 2x), which neither end overflows.
        s = outer * (1.0 - 2.0 / (1.0 + gl.exp2(s * inner)))
    if C.BIASED:
        if not C.SOFTCAP:
            s = s * scale
        s -= slope * gl.abs((stands[:, None] - lane).to(gl.float32) - j.to(gl.float32))
    if CUT:  # noqa: SIM102 - known when it is compiled
        if cut:
            hidden = j >= last[:, None] - lane
            if C.LEFT:
                hidden = hidden | (j < first[:, None] - lane)
            if C.KEEP:
                hidden = hidden & ((j < base[:, None] - lane) | (j >= kept[:, None] - lane))
            s = gl.where(hidden, float("-inf"), s)
    # A scale that is not negative commutes with the maximum and fuses with the subtraction.
    above = gl.max(s, axis=1)
    if not SCALED:
        above = above * scale
    above = gl.maximum(peak, above)
    if not SCALED:
        s = s * scale
    return gl.exp2(s - above[:, None]), above, gl.exp2(peak - above)


@gluon.jit
def partial_sums(p, C: gl.constexpr):
    """Sum the weights that one thread holds of a row, without a word to other threads: [M, 8]."""
    return gl.convert_layout(gl.sum(gl.reshape(p, [C.M, C.N // 8, 8]), axis=1), C.SUMS, assert_trivial=True)


@gluon.jit
def clean(value, C: gl.constexpr):
    """Zero what is not finite in a tile of values, in place: nobody sees it, and 0 · NaN is not 0.

    Called on cut tiles only. A key that some query sees must be finite, so only keys that none sees are changed; every
    warpgroup writes the same zeros before it multiplies.
    """
    N: gl.constexpr = C.N
    E: gl.constexpr = C.E
    SLICE: gl.constexpr = 2048 // E
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    flat = value.reshape([N, E])
    found = gl.zeros([SLICE, E], gl.int32, L)
    for i in gl.static_range(N // SLICE):
        x = flat.slice(i * SLICE, SLICE).load(L)
        found = found | gl.where(gl.abs(x.to(gl.float32)) < float("inf"), 0, 1)
    if gl.max(gl.reshape(found, [SLICE * E]), axis=0) > 0:
        for i in gl.static_range(N // SLICE):
            x = flat.slice(i * SLICE, SLICE).load(L)
            flat.slice(i * SLICE, SLICE).store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0))
        fence_async_shared()
    meet()


@gluon.jit
def begin(it, column, query, keys, values, bars, seen, factors, MASKED: gl.constexpr, C: gl.constexpr):
    """Weigh the first tile of keys: nothing to rescale, and no values of a tile before it."""
    _, _, k_full, k_empty, v_full, _, _, _ = bars
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    slot, phase = turn(it, C.STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    key = keys.index(slot).reshape([N, C.D]).permute((1, 0))
    nothing = gl.zeros([M, N], gl.float32, C.SCORES)
    s = warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)
    s = wait_for(0, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    none = gl.full([M], LOWEST, gl.float32, gl.SliceLayout(1, C.SCORES))
    p, peak, _ = weigh(s, none, column, seen, factors, True, MASKED, C)
    if C.DEAD:
        mbarrier.wait(v_full.index(slot), phase)
        clean(values.index(slot), C)
    return gl.convert_layout(p.to(query.dtype), gl.DotOperandLayout(0, C.OUT, 2)), partial_sums(p, C), peak


@gluon.jit
def absorb(
    acc, weight, sums, peak, it, column, query, keys, values, bars, seen, factors, cut,
    CUT: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """One step: scores of a tile of keys beside the values of the tile before it, then its weights."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    slot, phase = turn(it + 1, C.STAGES)
    slot_before, phase_before = turn(it, C.STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    key = keys.index(slot).reshape([N, C.D]).permute((1, 0))
    nothing = gl.zeros([M, N], gl.float32, C.SCORES)
    s = warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)  # [M, N]
    mbarrier.wait(v_full.index(slot_before), phase_before)
    acc = warpgroup_mma(weight, values.index(slot_before).reshape([C.N, C.E]), acc, is_async=True)  # [M, E]
    s = wait_for(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, peak, rescale = weigh(s, peak, column, seen, factors, cut, CUT, C)
    by_row = gl.convert_layout(rescale, gl.SliceLayout(1, C.SUMS), assert_trivial=True)
    sums = sums * by_row[:, None] + partial_sums(p, C)
    if C.OVERLAP:
        # Passed already. It ends a block of instructions, across which ptxas moves no exponential to after the wait.
        mbarrier.wait(v_full.index(slot_before), phase_before)
    acc = wait_for(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(slot_before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, C.OUT), assert_trivial=True)[:, None]
    weight = gl.convert_layout(p.to(query.dtype), gl.DotOperandLayout(0, C.OUT, 2))
    if CUT and C.DEAD:  # noqa: SIM102 - known when it is compiled
        if cut:
            mbarrier.wait(v_full.index(slot), phase)
            clean(values.index(slot), C)
    return acc, weight, sums, peak, it + 1


@gluon.jit
def bounds_of(row, line, sizes, interval, rows, sequences, alibi, slopes, alibi_b, C: gl.constexpr):
    """What masks and biases know of a warpgroup's rows: first key, end, head's start and end, position [M]; slope."""
    _, h, _, m, b = sizes
    i = row + gl.arange(0, C.M, gl.SliceLayout(1, C.SCORES))
    low, high, stop, position = interval_of(line // h, interval, sequences, C)
    first = gl.maximum(i + low, 0)
    last = gl.minimum(i + high, stop)
    stands = i + position
    base = i
    kept = i
    if C.MASK == "rows":
        size = gl.cast(b, gl.int64) * m
        at = rows + gl.cast(line // h, gl.int64) * m + i
        first = gl.load(at, mask=i < m, other=0)
        last = gl.load(at + size, mask=i < m, other=0)
        if C.KEEP:
            base = gl.load(at + 2 * size, mask=i < m, other=0)
            kept = gl.minimum(base + interval[4], last)
        if C.BIASED:
            stands = gl.load(at + 3 * size, mask=i < m, other=0)
    slope = 0.0
    if C.BIASED:
        slope = gl.load(alibi + line // h * alibi_b + line % h, mask=slopes > 0, other=0.0) * LOG2_E
    return first, last, base, kept, stands, slope


@gluon.jit
def own_tiles(tile, w, batch, first, last, sizes, interval, sequences, plan, C: gl.constexpr):
    """Tiles of keys of warpgroup w among those that are loaded, and those it sees whole."""
    tiles, _, _, m, _ = sizes
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
        own_first, own_last, full_first, full_last = keys_of((tile * C.W + w) * C.M, m, low, high, stop, C.M, C.N)
        own_first, own_last, full_first, full_last = within(own_first, own_last, full_first, full_last, first, last)
    return own_first, own_last, full_first, full_last


@gluon.jit
def log_sum(peak, sums, line, row, sizes, lse, sink, sinks, sink_b, C: gl.constexpr):
    """Write the log-sum-exp of a warpgroup's rows, and return what their sums of values are to be multiplied with."""
    _, h, _, m, _ = sizes
    DOWN: gl.constexpr = gl.SliceLayout(1, C.SCORES)
    total = gl.convert_layout(gl.sum(sums, axis=1), DOWN, assert_trivial=True)
    # A sink is a key of value zero, seen by every row; a score of -inf is none.
    peak = gl.where(total == 0.0, float("-inf"), peak)
    score = gl.load(sink + line // h * sink_b + line % h, mask=sinks > 0, other=float("-inf"))
    top = gl.maximum(peak, score * LOG2_E)
    finite = gl.where(top == float("-inf"), 0.0, top)
    shrink = gl.exp2(peak - finite)
    total = total * shrink + gl.exp2(score * LOG2_E - finite)
    empty = total == 0.0
    natural = gl.where(empty, float("-inf"), (top + gl.log2(total)) * LN_2)
    # A row without keys keeps the sink exactly, which log2 and back would round.
    natural = gl.where(peak == float("-inf"), score, natural)
    i = row + gl.arange(0, C.M, DOWN)
    gl.store(lse + gl.cast(line, gl.int64) * m + i, natural, mask=i < m)
    return gl.where(empty, 0.0, shrink / total)


@gluon.jit
def write(acc, line, row, m, e, out, out_at, staging, C: gl.constexpr):
    """Write a warpgroup's rows of out: by the copy engine, or from registers where they do not fit its tiles."""
    M: gl.constexpr = C.M
    E: gl.constexpr = C.E
    if C.STAGED:
        if not C.REUSE:
            store_wait(0)
        staging.reshape([M, E]).store(acc.to(out.dtype))
        fence_async_shared()
        store_tile(out, [line, row, 0], staging)
        if C.REUSE:
            store_wait(0)
    else:
        down = row + gl.arange(0, M, gl.SliceLayout(1, C.OUT))
        across = gl.arange(0, E, gl.SliceLayout(0, C.OUT))
        at = out_at + gl.cast(line, gl.int64) * m * e + down.to(gl.int64)[:, None] * e + across[None, :]
        gl.store(at, acc.to(out_at.dtype.element_ty), mask=(down < m)[:, None] & (across < e)[None, :])


@gluon.jit
def consume(  # noqa: PLR0915 - the schedule is one piece
    w: gl.constexpr, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars, mailbox,
    sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: M queries of every tile."""
    q_full, q_empty, _, _, v_full, v_empty, next_full, next_empty = bars
    tiles, h, _, m, b = sizes
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    E: gl.constexpr = C.E
    MASKED: gl.constexpr = C.MASK != "none"
    CUT: gl.constexpr = C.MASK != "none" and not C.ONCE
    index = gl.program_id(0)
    it = 0
    parity = 0
    while index < total:
        tile, line = place(index, tiles, b * h, C.HEADS, MASKED)
        row = (tile * C.W + w) * M
        first, last, head_first, head_last = loaded(tile, line // h, sizes, interval, sequences, plan, C)
        own_first, own_last, full_first, full_last = own_tiles(
            tile, w, line // h, first, last, sizes, interval, sequences, plan, C
        )
        seen = bounds_of(row, line, sizes, interval, rows, sequences, alibi, slopes, alibi_b, C)
        end = own_last - own_first + head_last - head_first
        after = own_first - first
        if MASKED:
            it = skip(it, last - own_last, bars, C.STAGES)

        mbarrier.wait(q_full.index(w), parity)
        query = queries.index(w).reshape([M, C.D])
        if C.HELD:
            query = query.load(gl.DotOperandLayout(0, C.SCORES, 2))
            mbarrier.arrive(q_empty.index(w), count=1)
        column = next_column(0, own_first, own_last, head_last, C)
        weight, sums, peak = begin(it, column, query, keys, values, bars, seen, factors, MASKED, C)
        acc = gl.zeros([M, E], gl.float32, C.OUT)
        # One loop, in which tiles that the mask cuts take a branch: weights that go from one loop to another would be
        # unpacked and packed again in every step of both. Where no other tile than the first is cut there is no branch.
        right = max(own_last - full_last, 1)
        left = max(own_last - full_first, right)
        for t in range(1, end):
            column = follow(column, t, own_first, own_last, head_last, C)
            cut = t < right
            if C.LEFT:
                cut = cut | (t >= left)
            acc, weight, sums, peak, it = absorb(
                acc, weight, sums, peak, it, column, query, keys, values, bars, seen, factors, cut, CUT, C
            )
        if not C.REUSE and not C.HELD:
            mbarrier.arrive(q_empty.index(w), count=1)
        slot, phase = turn(it, C.STAGES)
        mbarrier.wait(v_full.index(slot), phase)
        acc = warpgroup_mma(weight, values.index(slot).reshape([N, E]), acc, is_async=True)
        inverse = log_sum(peak, sums, line, row, sizes, lse, sink, sinks, sink_b, C)
        acc = wait_for(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(slot), count=1)
        it += 1
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, C.OUT), assert_trivial=True)[:, None]
        write(acc, line, row, m, e, out, out_at, outs.index(w), C)
        if C.REUSE:
            mbarrier.arrive(q_empty.index(w), count=1)
        if MASKED:
            it = skip(it, after, bars, C.STAGES)  # also where no query of this warpgroup exists
        mbarrier.wait(next_full, parity)
        index = gl.sum(mailbox.load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
        mbarrier.arrive(next_empty, count=1)
        parity ^= 1
    store_wait(0)


@planned
@gluon.jit(do_not_specialize=["total", "tiles", "h", "group", "m", "b", "e", "low", "high", "stop", "position", "keep",
                              "sinks", "slopes", "sink_b", "alibi_b"])  # fmt: skip
def forward_kernel(
    q, k, v, out, out_at, lse, sink, alibi, rows, sequences, plan, counter,
    total, tiles, h, group, m, b, e, low, high, stop, position, keep, sinks, slopes, sink_b, alibi_b,
    scale, inner, outer,
    C: gl.constexpr,
):  # fmt: skip
    """Lay out shared memory and barriers, and set the partitions to work."""
    queries = gl.allocate_shared_memory(q.dtype, [C.W, 1, 1, C.M, C.D], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [C.STAGES, 1, 1, C.N, C.D], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [C.STAGES, 1, 1, C.N, C.E], v.layout)
    outs = queries
    if C.STAGED and not C.REUSE:
        outs = gl.allocate_shared_memory(out.dtype, [C.W, 1, C.M, C.E], out.layout)
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
    zero: gl.constexpr = gl.constexpr(0)
    one: gl.constexpr = gl.constexpr(1)
    two: gl.constexpr = gl.constexpr(2)
    if W == 2:
        gl.warp_specialize([
            (consume, (zero, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (consume, (one, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (produce, (q, k, v, queries, keys, values, bars, mailbox, counter, plan, sequences, sizes, interval, total,
                       C)),
        ], [4, 1], [C.REGISTERS, C.LOADER])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (zero, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (consume, (one, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (consume, (two, out, out_at, lse, sink, alibi, rows, sequences, plan, queries, keys, values, outs, bars,
                       mailbox, sizes, interval, factors, sinks, slopes, sink_b, alibi_b, total, e, C)),
            (produce, (q, k, v, queries, keys, values, bars, mailbox, counter, plan, sequences, sizes, interval, total,
                       C)),
        ], [4, 4, 1], [C.REGISTERS, C.REGISTERS, C.LOADER])  # fmt: skip
