# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
"""FlashAttention forward on e4m3 heads for sm_90 (FlashAttention-3, arXiv:2407.08608, §3.3), warp-specialised.

The loader, its ring and the barriers are those of `forward_kernel`. A warpgroup computes scores, weights and sums of
values in turn, and the others' products run beside its exponentials; what eight bits change:

- **Keys of values are contiguous.** The tensor cores read eight-bit operands along the summed axis only, so a tile of
  values is [E, N], as `values` lays them out.
- **Weights become an operand.** A thread of an accumulator holds, of every 16 keys, numbers 2t, 2t + 1, 8 + 2t and
  9 + 2t (t its place among four threads); as an operand it has to hold 4t … 4t + 3. The values of the former lie at the
  places of the latter (`values`), so that its registers are the operand.
- **Weights are 2^8 too large.** The largest of a row is 256 and not 1, so that eight bits reach 2^-17 of it. Their sum
  is as much too large, and the quotient is right.
- **Sums of values leave the tensor cores after every tile.** These add eight-bit products with 13 bits after the
  largest summand and drop the rest: 16k values of mean 1, summed there, came out 18 % too small on an H200. One fused
  multiply-add a number adds a tile to the sums in float32, in place of the multiplication that rescales them. Where
  registers do not hold the sums twice, a tile is multiplied in PARTS of the values' width.
- **Scales are two numbers a head**: that of queries times that of keys is part of the softmax scale; that of values
  multiplies the result.
Shapes: M queries of a warpgroup, N keys of a tile, D head and E value dimension padded to a power of two.
"""

from ..flash.plan import planned
from .gluon import barrier as meet
from .gluon import fence_async_shared, gl, gluon, load_tile, mbarrier, store_tile, store_wait, warpgroup_mma
from .gluon import warpgroup_mma_wait as wait_for
from .tiles import keys_of, place, within

LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
OFFSET: gl.constexpr = gl.constexpr(8.0)  # weights are 2^8 too large
LOWEST: gl.constexpr = gl.constexpr(-3.4028234663852886e38)  # of float32: the peak of a row that has seen no key
LEAST: gl.constexpr = gl.constexpr(1e-37)  # a factor of 0 would make NaN of a score of -inf


@gluon.jit
def turn(it, STAGES: gl.constexpr):
    """Slot of the ring, and parity of the turn, of the it-th tile of keys."""
    return it % STAGES, (it // STAGES) & 1


@gluon.jit
def produce(q, k, v, queries, keys, values, bars, mailbox, counter, sizes, interval, total, C: gl.constexpr):
    """The loader: queries of every tile, keys one tile ahead of values; and the next tile's number for everyone."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty = bars
    tiles, h, group, m, b = sizes
    low, high, stop = interval
    W: gl.constexpr = C.W
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    ROWS: gl.constexpr = C.W * C.M
    programs = gl.num_programs(0)
    index = gl.program_id(0)
    it = 0
    parity = 1
    while index < total:
        tile, line = place(index, tiles, b * h, C.HEADS, C.MASKED)
        batch = line // h
        head = line - batch * h
        first, last, _, _ = keys_of(tile * ROWS, m, low, high, stop, ROWS, N)
        count = max(last, first + 1) - first
        for w in gl.static_range(W):
            mbarrier.wait(q_empty.index(w), parity)
            mbarrier.expect(q_full.index(w), M * C.D)
            load_tile(q, [batch, head, (tile * W + w) * M, 0], q_full.index(w), queries.index(w))
        column = (first + count - 1) * N
        slot, phase = turn(it, C.STAGES)
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_full.index(slot), N * C.D)
        load_tile(k, [batch, head // group, column, 0], k_full.index(slot), keys.index(slot))
        following = programs + index  # the end, if there is a program for every tile
        if total > programs:
            following = programs + gl.atomic_add(counter, 1, sem="relaxed")
        for _ in range(1, count):
            slot, phase = turn(it + 1, C.STAGES)
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), N * C.D)
            load_tile(k, [batch, head // group, column - N, 0], k_full.index(slot), keys.index(slot))
            slot, phase = turn(it, C.STAGES)
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), N * C.E)
            load_tile(v, [batch, head // group, 0, column], v_full.index(slot), values.index(slot))
            column -= N
            it += 1
        slot, phase = turn(it, C.STAGES)
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(v_full.index(slot), N * C.E)
        load_tile(v, [batch, head // group, 0, column], v_full.index(slot), values.index(slot))
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
def weigh(s, peak, column, seen, factor, cut, C: gl.constexpr):
    """Turn products of e4m3 numbers [M, N] into weights · 2^8 under each row's new peak: ``(p, peak, rescale)``.

    Only ``cut`` tiles may hold keys that a row does not see. A peak is finite at all times, so that -inf less the peak
    is -inf, and a weight of 0.
    """
    first, last = seen
    if C.MASKED:  # noqa: SIM102 - known when it is compiled
        if cut:
            # See `forward_kernel.weigh`: columns in two parts keep 32 numbers out of registers.
            j = gl.arange(0, C.N, gl.SliceLayout(0, C.SCORES))[None, :]
            lane = column + (j & 6)
            j = j & ~6
            hidden = j >= last[:, None] - lane
            if C.LEFT:
                hidden = hidden | (j < first[:, None] - lane)
            s = gl.where(hidden, float("-inf"), s)
    above = gl.maximum(peak, gl.max(s, axis=1) * factor)
    p = gl.exp2(s * factor - (above - OFFSET)[:, None])
    return p, above, gl.exp2(peak - above)


@gluon.jit
def partial_sums(p, C: gl.constexpr):
    """Sum the weights that one thread holds of a row, without a word to other threads: [M, 8]."""
    return gl.convert_layout(gl.sum(gl.reshape(p, [C.M, C.N // 8, 8]), axis=1), C.SUMS, assert_trivial=True)


@gluon.jit
def operand(p, C: gl.constexpr):
    """Round weights to e4m3, as the left operand of a product."""
    weight = p.to(gl.float8e4nv)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, C.OUT, 4)
    parts = gl.permute(gl.reshape(weight, [C.M, C.N // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    return gl.convert_layout(gl.reshape(parts, [C.M, C.N]), LEFT, assert_trivial=True)


@gluon.jit
def clean(value, C: gl.constexpr):
    """Zero NaN in a tile of values, in place: nobody sees it, and 0 · NaN is not 0; see `forward_kernel.clean`."""
    E: gl.constexpr = C.E
    N: gl.constexpr = C.N
    L: gl.constexpr = gl.BlockedLayout([1, 16], [512 // N, N // 16], [4, 1], [1, 0])
    flat = value.reshape([E, N])
    for i in gl.static_range(E // 64):
        x = flat.slice(i * 64, 64).load(L)
        flat.slice(i * 64, 64).store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0))
    fence_async_shared()
    meet()


@gluon.jit
def down(row, C: gl.constexpr):
    """Numbers of the rows of scores, as factors of the rows of sums."""
    return gl.convert_layout(row, gl.SliceLayout(1, C.OUT), assert_trivial=True)[:, None]


@gluon.jit
def absorb(acc, sums, peak, it, column, query, keys, values, bars, seen, factor, cut, C: gl.constexpr):
    """One step: products with a tile of keys, their weights, and their values, PARTS of the head's width in turn."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    slot, phase = turn(it, C.STAGES)
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    PARTS: gl.constexpr = C.PARTS
    WIDTH: gl.constexpr = C.E // PARTS
    mbarrier.wait(k_full.index(slot), phase)
    nothing = gl.zeros([M, N], gl.float32, C.SCORES)
    key = keys.index(slot).reshape([N, C.D]).permute((1, 0))
    s = warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)  # [M, N]
    s = wait_for(0, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, peak, rescale = weigh(s, peak, column, seen, factor, cut, C)
    by_row = gl.convert_layout(rescale, gl.SliceLayout(1, C.SUMS), assert_trivial=True)
    sums = sums * by_row[:, None] + partial_sums(p, C)
    weight = operand(p, C)
    mbarrier.wait(v_full.index(slot), phase)
    if C.DEAD:  # noqa: SIM102 - known when it is compiled
        if cut:
            clean(values.index(slot), C)
    by_row = down(rescale, C)
    value = values.index(slot).reshape([C.E, N])
    nothing = gl.zeros([M, WIDTH], gl.float32, C.OUT)
    parts = ()
    for part in gl.static_range(PARTS):
        transposed = value.slice(part * WIDTH, WIDTH).permute((1, 0))
        product = warpgroup_mma(weight, transposed, nothing, use_acc=False, is_async=True)
        product = wait_for(0, deps=(product,))  # [M, WIDTH]
        parts = parts + (acc[part] * by_row + product,)  # noqa: RUF005 - no star in a kernel
    mbarrier.arrive(v_empty.index(slot), count=1)
    return parts, sums, peak, it + 1


@gluon.jit
def log_sum(peak, sums, line, row, m, lse, C: gl.constexpr):
    """Write the log-sum-exp of a warpgroup's rows, and return what their sums of values are to be multiplied with."""
    DOWN: gl.constexpr = gl.SliceLayout(1, C.SCORES)
    total = gl.convert_layout(gl.sum(sums, axis=1), DOWN, assert_trivial=True)
    empty = total == 0.0
    natural = gl.where(empty, float("-inf"), (peak + gl.log2(total) - OFFSET) * LN_2)
    i = row + gl.arange(0, C.M, DOWN)
    gl.store(lse + gl.cast(line, gl.int64) * m + i, natural, mask=i < m)
    return gl.where(empty, 0.0, 1.0 / total)


@gluon.jit
def write(acc, inverse, line, row, m, e, out, out_at, staging, C: gl.constexpr):
    """Write a warpgroup's rows of out: by the copy engine, or from registers where they are not STAGED."""
    M: gl.constexpr = C.M
    E: gl.constexpr = C.E
    PARTS: gl.constexpr = C.PARTS
    WIDTH: gl.constexpr = E // PARTS
    if C.STAGED:
        store_wait(0)
        for part in gl.static_range(PARTS):
            staging.reshape([M, E]).slice(part * WIDTH, WIDTH, 1).store((acc[part] * inverse).to(out.dtype))
        fence_async_shared()
        store_tile(out, [line, row, 0], staging)
    else:
        i = row + gl.arange(0, M, gl.SliceLayout(1, C.OUT))
        for part in gl.static_range(PARTS):
            across = part * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, C.OUT))
            at = out_at + gl.cast(line, gl.int64) * m * e + i.to(gl.int64)[:, None] * e + across[None, :]
            gl.store(at, acc[part] * inverse, mask=(i < m)[:, None] & (across < e)[None, :])


@gluon.jit
def consume(  # noqa: PLR0915 - the schedule is one piece
    w: gl.constexpr, out, out_at, lse, q_scale, k_scale, v_scale, queries, keys, values, outs, bars, mailbox,
    sizes, interval, scale, total, e, C: gl.constexpr,
):  # fmt: skip
    """Warpgroup w: M queries of every tile."""
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty, next_full, next_empty = bars
    tiles, h, group, m, b = sizes
    low, high, stop = interval
    M: gl.constexpr = C.M
    N: gl.constexpr = C.N
    PARTS: gl.constexpr = C.PARTS
    WIDTH: gl.constexpr = C.E // PARTS
    ROWS: gl.constexpr = C.W * C.M
    MASKED: gl.constexpr = C.MASKED
    query = queries.index(w).reshape([M, C.D])
    index = gl.program_id(0)
    it = 0
    parity = 0
    while index < total:
        tile, line = place(index, tiles, b * h, C.HEADS, MASKED)
        row = (tile * C.W + w) * M
        first, last, full_first, full_last = keys_of(tile * ROWS, m, low, high, stop, ROWS, N)
        last = max(last, first + 1)
        own_first = first
        own_last = last
        if MASKED:
            own_first, own_last, full_first, full_last = keys_of(row, m, low, high, stop, M, N)
            own_first, own_last, full_first, full_last = within(own_first, own_last, full_first, full_last, first, last)
        i = row + gl.arange(0, M, gl.SliceLayout(1, C.SCORES))
        seen = (gl.maximum(i + low, 0), gl.minimum(i + high, stop))
        line_of_keys = line // h * (h // group) + line % h // group
        factor = gl.maximum(scale * gl.load(q_scale + line) * gl.load(k_scale + line_of_keys), LEAST)
        if MASKED:
            it = skip(it, last - own_last, bars, C.STAGES)

        mbarrier.wait(q_full.index(w), parity)
        # From the last tile to the first; those that the mask cuts, on the right or on the left, take a branch.
        right = own_last - full_last
        left = max(own_last - full_first, right)
        column = own_last * N
        nothing = gl.zeros([M, WIDTH], gl.float32, C.OUT)
        acc = (nothing,)
        for _ in gl.static_range(1, PARTS):
            acc = acc + (nothing,)  # noqa: RUF005
        sums = gl.zeros([M, 8], gl.float32, C.SUMS)
        peak = gl.full([M], LOWEST, gl.float32, gl.SliceLayout(1, C.SCORES))
        for t in range(own_last - own_first):
            column -= N
            cut = t < right
            if C.LEFT:
                cut = cut | (t >= left)
            acc, sums, peak, it = absorb(acc, sums, peak, it, column, query, keys, values, bars, seen, factor, cut, C)
        mbarrier.arrive(q_empty.index(w), count=1)
        inverse = log_sum(peak, sums, line, row, m, lse, C) * gl.load(v_scale + line_of_keys)
        # Where out is staged does not depend on the tile, but must seem to: else its addresses, 46 registers, would be
        # kept through all tiles.
        write(acc, down(inverse, C), line, row, m, e, out, out_at, outs.index(w + min(index, 0)), C)
        if MASKED:
            it = skip(it, own_first - first, bars, C.STAGES)  # also where no query of this warpgroup exists
        mbarrier.wait(next_full, parity)
        index = gl.sum(mailbox.load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
        mbarrier.arrive(next_empty, count=1)
        parity ^= 1
    store_wait(0)


@planned
@gluon.jit(do_not_specialize=["total", "tiles", "h", "group", "m", "b", "e", "low", "high", "stop"])
def fp8_kernel(
    q, k, v, out, out_at, lse, q_scale, k_scale, v_scale, counter,
    total, tiles, h, group, m, b, e, low, high, stop, scale,
    C: gl.constexpr,
):  # fmt: skip
    """Lay out shared memory and barriers, and set the partitions to work."""
    queries = gl.allocate_shared_memory(q.dtype, [C.W, 1, 1, C.M, C.D], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [C.STAGES, 1, 1, C.N, C.D], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [C.STAGES, 1, 1, C.E, C.N], v.layout)
    outs = queries
    if C.STAGED:
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
    interval = (low, high, stop)
    # What is passed on to warps of their own must be written out: a constant inside a tuple would become a variable.
    zero: gl.constexpr = gl.constexpr(0)
    one: gl.constexpr = gl.constexpr(1)
    two: gl.constexpr = gl.constexpr(2)
    if W == 2:
        gl.warp_specialize([
            (consume, (zero, out, out_at, lse, q_scale, k_scale, v_scale, queries, keys, values, outs, bars, mailbox,
                       sizes, interval, scale, total, e, C)),
            (consume, (one, out, out_at, lse, q_scale, k_scale, v_scale, queries, keys, values, outs, bars, mailbox,
                       sizes, interval, scale, total, e, C)),
            (produce, (q, k, v, queries, keys, values, bars, mailbox, counter, sizes, interval, total, C)),
        ], [4, 1], [C.REGISTERS, C.LOADER])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (zero, out, out_at, lse, q_scale, k_scale, v_scale, queries, keys, values, outs, bars, mailbox,
                       sizes, interval, scale, total, e, C)),
            (consume, (one, out, out_at, lse, q_scale, k_scale, v_scale, queries, keys, values, outs, bars, mailbox,
                       sizes, interval, scale, total, e, C)),
            (consume, (two, out, out_at, lse, q_scale, k_scale, v_scale, queries, keys, values, outs, bars, mailbox,
                       sizes, interval, scale, total, e, C)),
            (produce, (q, k, v, queries, keys, values, bars, mailbox, counter, sizes, interval, total, C)),
        ], [4, 4, 1], [C.REGISTERS, C.REGISTERS, C.LOADER])  # fmt: skip
