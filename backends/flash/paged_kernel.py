# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of ragged queries to a paged cache: the block table is read in the kernel, and the work is cut up there.

The host knows neither how many queries a sequence has nor how many keys, and does not ask. Every program makes the
same plan from the lengths: sequence s has row tiles (as in `decode_kernel`) and key tiles; keys are cut into parts of
about equal cost, and part by part, row tile by row tile, sequence by sequence these are numbered. The grid is an upper
bound of their number. Tokens past the last sequence are one more sequence, without keys.
Shapes: B sequences of the plan, a power of two; M rows and N keys of a tile; D, D2 and E as in `decode_kernel`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_kernel import add_sink_score, finish, fold_tile, load_query, merge_parts, share, tiles_of
from .plan import planned
from .tiles import cut_start


@triton.jit
def plan(
    q_lengths, lengths, q_lengths_s, lengths_s, b, tokens, group, reach, capacity, wanted, least,
    B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Cut all sequences up: first query, row tiles and parts of a row tile of each, [B] all of them.

    reach: keys that a row tile sees at most. capacity: keys that a row of the table holds. wanted: about how many
    programs a key head shall have. least: key tiles of a part. ONE: there is one row tile.
    """
    s = tl.arange(0, B)
    queries = tl.maximum(tl.load(q_lengths + s * q_lengths_s, mask=s < b, other=0).to(tl.int32), 0)
    keys = tl.load(lengths + s * lengths_s, mask=s < b, other=0).to(tl.int32)
    stop = tl.cumsum(queries, 0)
    start = stop - queries
    stop = tl.where(s == b, tokens, stop)
    count = tl.maximum(tl.minimum(stop, tokens) - tl.minimum(start, tokens), 0)
    tiles = tl.cdiv(count * group, M)
    cost = tl.cdiv(tl.minimum(tl.minimum(tl.maximum(keys, 0), capacity), reach), N)
    whole = tl.sum(tiles.to(tl.int64) * cost, 0)
    size = tl.maximum(tl.cdiv(whole, wanted), least)
    parts = tl.maximum(tl.cdiv(cost, size), 1).to(tl.int32)
    if not ONE:
        total = tl.sum(tiles * parts, 0)
        # Rounded up sequence by sequence, that may just exceed a wave, which fewer and larger parts would fill. Without
        # a branch: beside one, triton 3.7 no longer pipelines the loads of the kernel.
        larger = tl.maximum(tl.cdiv(cost, size * tl.cdiv(total, wanted)), 1).to(tl.int32)
        parts = tl.where(duration(tiles, cost, larger, wanted) < duration(tiles, cost, parts, wanted), larger, parts)
    return start, tiles, parts


@triton.jit
def duration(tiles, cost, parts, wanted):
    """Say for how many key tiles' time it takes to work parts off, about ``wanted`` at once."""
    longest = tl.max(tl.where(tiles > 0, tl.cdiv(cost, parts), 0), 0)
    return tl.cdiv(tl.sum(tiles * parts, 0), wanted).to(tl.int64) * longest


@triton.jit
def locate(index, count):
    """Find which of the sequences, with ``count`` [B] pieces each, has the piece: sequence, and its first piece."""
    stop = tl.cumsum(count, 0)
    before = stop <= index
    return tl.sum(before.to(tl.int32), 0), tl.max(tl.where(before, stop, 0), 0)


@triton.jit
def element(x, index, B: tl.constexpr):
    """Pick ``x[index]``."""
    return tl.sum(tl.where(tl.arange(0, B) == index, x, 0), 0)


@triton.jit
def sees(stands, length, low, high, prefix, chunk, other, PREFIX: tl.constexpr, CHUNKS: tl.constexpr):
    """First and last key of queries that stand at some positions of their sequence: [M], [M]."""
    first = tl.maximum(stands + low, 0)
    last = tl.minimum(stands + high, length)
    if PREFIX:
        last = tl.minimum(last, tl.maximum(stands + 1, prefix))
    if CHUNKS > 0:
        first, last = within(stands, first, last, chunk)
    if CHUNKS > 1:
        first, last = within(stands, first, last, other)
    return first, last


@triton.jit
def within(stands, first, last, size):
    """Keep to the chunk in which a query stands."""
    begin = tl.maximum(stands, 0) // size * size
    return tl.maximum(first, begin), tl.where(stands < 0, 0, tl.minimum(last, begin + size))


@triton.jit
def prefetch(table, table_b, table_t, line, b, width):
    """Bring a line of the table into the L2 cache, while the plan is made that says which entries are wanted.

    Every program brings one of 32 entries: together what 8000 and more pages take, whoever needs them.
    """
    lines = tl.maximum((width + 31) // 32, 1)
    row = line // lines
    at = table + row.to(tl.int64) * table_b + (line % lines * 32).to(tl.int64) * table_t
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [at.to(tl.int64), ((row < b) & (width > 0)).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_pages(table, begin, low, high, keep, table_t, N: tl.constexpr, PAGE: tl.constexpr, KEEP: tl.constexpr):
    """Load the pages of keys [begin, begin + N): one number where they share a page, else one per key.

    Only of keys in [low, high) and before ``keep``: no entry is read that no query of the row tile needs.
    """
    if PAGE % N == 0:
        page = tl.load(table + (begin // PAGE).to(tl.int64) * table_t, mask=begin < high, other=0)
    else:
        j = begin + tl.arange(0, N)
        wanted = (j >= low) & (j < high)
        if KEEP:
            wanted = wanted | ((j < keep) & (j < high))
        page = tl.load(table + (j // PAGE).to(tl.int64) * table_t, mask=wanted, other=0)
    return page.to(tl.int64)


@triton.jit
def load_paged(
    pool, page, head, begin, live, width, stride_p, stride_h, stride_n,
    N: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr, CUT: tl.constexpr, PAGE: tl.constexpr,
    DESCRIPTOR: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Load keys [begin, begin + N) of a head: [N, W]. A key that is not live is zero, or what its slot holds."""
    if DESCRIPTOR:
        tile = pool.load([page.to(tl.int32), head.to(tl.int32), begin % PAGE, 0]).reshape([N, W])
    else:
        down = tl.arange(0, N)
        across = tl.arange(0, W)
        if PAGE % N == 0:
            origin = pool + head * stride_h + page * stride_p + (begin % PAGE).to(tl.int64) * stride_n
            if FAR:
                at = origin + down.to(tl.int64)[:, None] * stride_n + across[None, :]
            else:
                at = origin + down[:, None] * stride_n + across[None, :]
        else:
            row = page * stride_p + ((begin + down) % PAGE).to(tl.int64) * stride_n
            at = pool + head * stride_h + row[:, None] + across[None, :]
        if CUT and WHOLE:
            tile = tl.load(at, mask=live[:, None], other=0.0)
        elif CUT:
            tile = tl.load(at, mask=live[:, None] & (across < width)[None, :], other=0.0)
        elif WHOLE:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(across < width)[None, :], other=0.0)
    return tile


@planned
@triton.jit(
    do_not_specialize=[
        "table_b", "b", "tokens", "low", "high", "prefix", "keep", "chunk", "other", "reach", "capacity", "wanted",
        "least",
    ],
    do_not_specialize_on_alignment=["q_lengths", "table", "lengths", "sink", "alibi"],
)  # fmt: skip
def paged_kernel(  # noqa: C901, PLR0915 - a flag is compiled away
    q, q_lengths, k, v, table, lengths, out, lse, parts, logs, sink, alibi,
    q_t, q_h, q_lengths_s, k_p, k_h, k_n, v_p, v_h, v_n, table_b, table_t, lengths_s,
    b, tokens, h, group, d, e, low, high, prefix, keep, chunk, other, scale, inner, outer,
    reach, capacity, wanted, least,
    B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_D2: tl.constexpr, WHOLE_E: tl.constexpr, PAGE: tl.constexpr,
    PREFIX: tl.constexpr, CHUNKS: tl.constexpr, KEEP: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr,
    ALIBI: tl.constexpr, NEGATIVE: tl.constexpr, SHARED: tl.constexpr, DESCRIPTOR: tl.constexpr, FAR: tl.constexpr,
    ONE: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend from one row tile of one sequence and key head to one part of the keys that it sees."""
    if EARLY:
        gdc_wait()  # this kernel, too, is launched before what precedes it is done
        gdc_launch_dependents()
        prefetch(table, table_b, table_t, tl.program_id(0), b, capacity // PAGE)
    heads_of_keys = h // group
    key_head = (tl.program_id(0) % heads_of_keys).to(tl.int64)
    item = tl.program_id(0) // heads_of_keys
    starts, tiles, splits = plan(
        q_lengths, lengths, q_lengths_s, lengths_s, b, tokens, group, reach, capacity, wanted, least, B, M, N, ONE
    )
    each = tiles * splits
    sequence, before = locate(item, each)
    if sequence >= B:  # the grid is an upper bound
        return
    start = element(starts, sequence, B)
    split = element(splits, sequence, B)
    parted = tl.sum(tl.where((tl.arange(0, B) < sequence) & (splits > 1), each, 0), 0)
    queries = tl.load(q_lengths + sequence * q_lengths_s, mask=sequence < b, other=0).to(tl.int32)
    length = tl.load(lengths + sequence * lengths_s, mask=sequence < b, other=0).to(tl.int32)
    length = tl.maximum(tl.minimum(length, capacity), 0)
    queries = tl.where(sequence == b, tokens - start, queries)
    item -= before
    part = item % split
    row = item // split * M + tl.arange(0, M)
    i = row // group
    head = key_head * group + row % group
    exists = (i < queries) & (start + i < tokens)
    stands = length - queries + i
    first, last = sees(stands, length, low, high, prefix, chunk, other, PREFIX, CHUNKS)
    last = tl.where(exists, last, 0)
    base = row * 0
    begin_cut, left, full_low, full, full_high, right, head_low, heads = tiles_of(
        exists, first, last, base, keep, length, N, KEEP
    )
    lowest = tl.min(tl.where(exists, first, length), 0)
    highest = tl.max(last, 0)
    slope = tl.zeros([M], tl.float32)
    if ALIBI:
        slope = tl.load(alibi + head, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634

    query, query_rest = load_query(q + (start + i).to(tl.int64) * q_t + head * q_h, exists, d, D, D2)
    table += sequence.to(tl.int64) * table_b
    acc = tl.zeros([M, E], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    full_from, full_to, cut_from, cut_to = share(part, split, full, heads + left + right)
    # The page of the next tile is looked up while this one is read: else each would wait for its table entry.
    end = full_low + full_to * N
    page = load_pages(table, full_low + full_from * N, 0, end, keep, table_t, N, PAGE, False)
    for t in tl.range(full_from, full_to):
        begin = full_low + t * N
        following = load_pages(table, begin + N, 0, end, keep, table_t, N, PAGE, False)
        key = load_paged(
            k, page, key_head, begin, exists, d, k_p, k_h, k_n,
            N, D, WHOLE_D, False, PAGE, DESCRIPTOR, FAR,
        )  # fmt: skip
        key_rest = key
        if D2 > 0:
            key_rest = load_paged(
            k + D, page, key_head, begin, exists, d - D, k_p, k_h, k_n,
            N, D2, WHOLE_D2, False, PAGE, False, FAR,
        )  # fmt: skip
        if SHARED:
            value = key
        else:
            value = load_paged(
            v, page, key_head, begin, exists, e, v_p, v_h, v_n,
            N, E, WHOLE_E, False, PAGE, DESCRIPTOR, FAR,
        )  # fmt: skip
        acc, total, peak = fold_tile(
            acc, total, peak, query, query_rest, key, key_rest, value, begin + tl.arange(0, N),
            scale, inner, outer, first, last, base, keep, stands, slope,
            False, M, N, D2, SOFTCAP, ALIBI, NEGATIVE, KEEP, True, INTERPRET,
        )  # fmt: skip
        page = following
    for t in tl.range(cut_from, cut_to):
        begin = cut_start(t, head_low, heads, begin_cut, left, full_high, N)
        page = load_pages(table, begin, lowest, highest, keep, table_t, N, PAGE, KEEP)
        j = begin + tl.arange(0, N)
        live = (j >= lowest) & (j < highest)
        if KEEP:
            live = live | ((j < keep) & (j < highest))
        key = load_paged(
            k, page, key_head, begin, live, d, k_p, k_h, k_n,
            N, D, WHOLE_D, True, PAGE, DESCRIPTOR, FAR,
        )  # fmt: skip
        key_rest = key
        if D2 > 0:
            key_rest = load_paged(
            k + D, page, key_head, begin, live, d - D, k_p, k_h, k_n,
            N, D2, WHOLE_D2, True, PAGE, False, FAR,
        )  # fmt: skip
        if SHARED:
            value = key
        else:
            value = load_paged(
            v, page, key_head, begin, live, e, v_p, v_h, v_n,
            N, E, WHOLE_E, True, PAGE, DESCRIPTOR, FAR,
        )  # fmt: skip
        acc, total, peak = fold_tile(
            acc, total, peak, query, query_rest, key, key_rest, value, j,
            scale, inner, outer, first, last, base, keep, stands, slope,
            True, M, N, D2, SOFTCAP, ALIBI, NEGATIVE, KEEP, True, INTERPRET,
        )  # fmt: skip

    across = tl.arange(0, E)
    there = exists[:, None] & (across < e)[None, :]
    if split > 1:
        mean, log_sum = finish(acc, total, peak)
        place = ((parted + item) * heads_of_keys + key_head) * M + tl.arange(0, M)
        tl.store(logs + place, log_sum, mask=exists)
        tl.store(parts + place[:, None] * e + across[None, :], mean, mask=there)
    else:
        blind = total == 0
        score = tl.zeros([M], tl.float32)
        if SINK:
            score = tl.load(sink + head, mask=exists, other=0.0).to(tl.float32)
            acc, total, peak = add_sink_score(acc, total, peak, score * 1.4426950408889634)
        mean, log_sum = finish(acc, total, peak)
        log_sum *= 0.6931471805599453
        if SINK:
            # A row without keys keeps the sink exactly, which log2 and back would round.
            log_sum = tl.where(blind, score, log_sum)
        line = (start + i).to(tl.int64) * h + head
        tl.store(lse + line, log_sum, mask=exists)
        tl.store(out + line[:, None] * e + across[None, :], mean.to(out.dtype.element_ty), mask=there)


@planned
@triton.jit(
    do_not_specialize=["b", "tokens", "reach", "capacity", "wanted", "least"],
    do_not_specialize_on_alignment=["q_lengths", "lengths", "sink"],
)
def paged_merge_kernel(
    q_lengths, lengths, parts, logs, sink, out, lse, q_lengths_s, lengths_s,
    b, tokens, h, group, e, reach, capacity, wanted, least,
    B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr,
    SINK: tl.constexpr, ONE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row of a row tile that has several, and add its sink."""
    heads_of_keys = h // group
    lane = tl.program_id(0) % M
    key_head = (tl.program_id(0) // M % heads_of_keys).to(tl.int64)
    index = tl.program_id(0) // M // heads_of_keys
    starts, tiles, splits = plan(
        q_lengths, lengths, q_lengths_s, lengths_s, b, tokens, group, reach, capacity, wanted, least, B, M, N, ONE
    )
    sequence, before = locate(index, tl.where(splits > 1, tiles, 0))
    if WAIT:
        gdc_wait()  # before any program ends: what is launched next must find the other kernel done, too
    if sequence >= B:
        return
    start = element(starts, sequence, B)
    split = element(splits, sequence, B)
    parted = tl.sum(tl.where((tl.arange(0, B) < sequence) & (splits > 1), tiles * splits, 0), 0)
    queries = tl.load(q_lengths + sequence * q_lengths_s).to(tl.int32)
    tile = index - before
    row = tile * M + lane
    i = row // group
    if (i >= queries) | (start + i >= tokens):
        return
    head = key_head * group + row % group
    place = ((parted + tile * split) * heads_of_keys + key_head) * M + lane
    line = (start + i).to(tl.int64) * h + head
    merge_parts(parts, logs, sink, head, out, lse, place, heads_of_keys * M, split, line, e, S, BLOCK, E, SINK)
