# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention of few queries, the keys of a row tile split over programs (Flash-Decoding, Dao et al. 2023).

A row tile holds the queries of all heads that share a key head, query by query: row p is query ``p // group`` of head
``p % group``, so that every key is read once for all of them. Each program folds its share of the key tiles that its
rows see, full ones first, and leaves a mean and a base-two log-sum-exp; `merge_parts` joins them.
Shapes: M rows and N keys of a tile, D head and E value dimension padded to a power of two, D2 what of the head
dimension is beyond D, padded likewise, or 0.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .plan import planned
from .tiles import base_two, cut_start, load_base, load_interval, load_position, load_tile, multiply, split, visible


@triton.jit
def fold_tile(
    acc, total, peak, query, query_rest, key, key_rest, value, j,
    scale, inner, outer, first, last, base, keep, stands, slope,
    CUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D2: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    NEGATIVE: tl.constexpr, KEEP: tl.constexpr, DEAD: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to what was summed so far: rescale under the new peak, then add."""
    score = multiply(query, tl.trans(key), tl.zeros([M, N], tl.float32), INTERPRET)
    if D2 > 0:
        score = multiply(query_rest, tl.trans(key_rest), score, INTERPRET)
    seen = visible(first[:, None], last[:, None], base[:, None], keep, j[None, :], KEEP)
    if NEGATIVE:
        score = -score  # and the scale is given as its magnitude
    if CUT or SOFTCAP or ALIBI:
        score = base_two(score, scale, inner, outer, SOFTCAP)
        if ALIBI:
            score -= slope[:, None] * tl.abs(stands[:, None] - j[None, :]).to(tl.float32)
        if CUT:
            score = tl.where(seen, score, -float("inf"))
        above = tl.maximum(peak, tl.max(score, 1))
        finite = above
        if CUT:
            # A row that has seen no key yet has no peak; any finite one will do.
            finite = tl.where(above == -float("inf"), 0.0, above)
        weight = tl.exp2(score - finite[:, None])
    else:
        # The scale is not negative: it commutes with the maximum and fuses with the subtraction.
        above = tl.maximum(peak, tl.max(score, 1) * scale)
        finite = above
        weight = tl.exp2(score * scale - finite[:, None])
    rescale = tl.exp2(peak - finite)
    total = total * rescale + tl.sum(weight, 1)
    acc = acc * rescale[:, None]
    if CUT and DEAD:
        # A key that no row sees may hold NaN, and 0 · NaN is not 0.
        alive = tl.max(seen.to(tl.int32), 0) > 0
        value = tl.where(alive[:, None], value, 0.0)
    acc = multiply(weight.to(value.dtype), value, acc, INTERPRET)
    return acc, total, above


@triton.jit
def load_query(at, exists, d, D: tl.constexpr, D2: tl.constexpr):
    """Load rows of queries, zeros past the last and past their width: [M, D], [M, D2 or 16]."""
    across = tl.arange(0, D)
    query = tl.load(at[:, None] + across[None, :], mask=exists[:, None] & (across < d)[None, :], other=0.0)
    rest = query
    if D2 > 0:
        beyond = D + tl.arange(0, D2)
        rest = tl.load(at[:, None] + beyond[None, :], mask=exists[:, None] & (beyond < d)[None, :], other=0.0)
    return query, rest


@triton.jit
def share(part, parts, full, cut):
    """Cut a row tile's key tiles, full ones first, into equal shares: full tiles [low, high), cut tiles [low, high)."""
    tiles = full + cut
    low = (tiles.to(tl.int64) * part // parts).to(tl.int32)
    high = (tiles.to(tl.int64) * (part + 1) // parts).to(tl.int32)
    return tl.minimum(low, full), tl.minimum(high, full), tl.maximum(low - full, 0), tl.maximum(high - full, 0)


@triton.jit
def tiles_of(exists, first, last, base, keep, n, N: tl.constexpr, KEEP: tl.constexpr):
    """Find the key tiles that a row tile sees: those of `split`, and where the head begins, and how many it has."""
    start, left, full_low, full, full_high, right = split(
        tl.min(tl.where(exists, first, n), 0), tl.max(last, 0),
        tl.max(tl.where(exists, first, 0), 0), tl.min(tl.where(exists, last, n), 0), N,
    )  # fmt: skip
    head_low = start
    heads = start * 0
    if KEEP:
        head_low = tl.maximum(tl.min(tl.where(exists, base, n), 0), 0) // N * N
        head_high = tl.minimum(tl.max(tl.where(exists, tl.minimum(base + keep, last), 0), 0), start)
        heads = tl.cdiv(tl.maximum(head_high - head_low, 0), N)
    return start, left, full_low, full, full_high, right, head_low, heads


@triton.jit
def add_sink_score(acc, total, peak, score):
    """Add a key of value zero to a fold: its score, base two, may be far above the peak or below it."""
    above = tl.maximum(peak, score)
    finite = tl.where(above == -float("inf"), 0.0, above)
    rescale = tl.exp2(peak - finite)
    return acc * rescale[:, None], total * rescale + tl.exp2(score - finite), above


@triton.jit
def finish(acc, total, peak):
    """Turn a fold into a mean and a base-two log-sum-exp: zero and -inf of rows that saw nothing."""
    empty = total == 0
    whole = tl.where(empty, 1.0, total)
    log_sum = tl.where(empty, -float("inf"), tl.where(empty, 0.0, peak) + tl.log2(whole))
    return acc / whole[:, None], log_sum


@planned
@triton.jit(
    do_not_specialize=[
        "m", "n", "low", "high", "stop", "position", "keep", "rows_size", "sink_b", "alibi_b", "splits",
    ],
    do_not_specialize_on_alignment=["sink", "alibi", "sequences"],
)  # fmt: skip
def few_kernel(  # noqa: C901, PLR0915 - a flag is compiled away
    q, k, v, out, lse, parts, logs, sink, alibi, rows, sequences,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, sink_b, alibi_b,
    h, group, m, n, d, e, low, high, stop, position, keep, rows_size, scale, inner, outer, splits,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, E: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_D2: tl.constexpr, WHOLE_E: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
    KEEP: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, ALIBI: tl.constexpr, NEGATIVE: tl.constexpr,
    DEAD: tl.constexpr, SHARED: tl.constexpr, DESCRIPTOR: tl.constexpr, FAR: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attend from one row tile of one key head to one share of the keys that it sees.

    SHARED: values are the first columns of the keys. SPLIT: leave a part, and not the whole. EARLY: let the kernel
    that merges be launched now, to wait for this one where it reads.
    """
    if EARLY:
        gdc_wait()  # this kernel, too, is launched before what precedes it is done
        gdc_launch_dependents()
    tiles = tl.cdiv(m * group, M)
    pid = tl.program_id(0)
    part = pid % splits
    tile = pid // splits % tiles
    key_head = pid // splits // tiles % (h // group)
    batch = pid // splits // tiles // (h // group)
    row = tile * M + tl.arange(0, M)
    exists = row < m * group
    i = row // group
    head = key_head * group + row % group
    first, last = load_interval(i, m, batch, low, high, stop, rows, rows_size, sequences, ROWS, EACH)
    base = first
    if KEEP:
        base = load_base(i, m, batch, rows, rows_size)
    start, left, full_low, full, full_high, right, head_low, heads = tiles_of(
        exists, first, last, base, keep, n, N, KEEP
    )
    slope = tl.zeros([M], tl.float32)
    stands = i
    if ALIBI:
        slope = tl.load(alibi + batch * alibi_b + head, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
        stands = load_position(i, m, batch, position, rows, rows_size, sequences, ROWS, EACH)

    at = q + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + i.to(tl.int64) * q_m
    query, query_rest = load_query(at, exists, d, D, D2)
    acc = tl.zeros([M, E], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    full_from, full_to, cut_from, cut_to = share(part, splits, full, heads + left + right)
    for t in tl.range(full_from, full_to):
        begin = full_low + t * N
        key = load_tile(k, batch, key_head, begin, n, d, k_b, k_h, k_n, N, D, WHOLE_D, False, DESCRIPTOR, FAR)
        key_rest = key
        if D2 > 0:
            key_rest = load_tile(
                k + D, batch, key_head, begin, n, d - D, k_b, k_h, k_n, N, D2, WHOLE_D2, False, False, FAR
            )
        if SHARED:
            value = key
        else:
            value = load_tile(v, batch, key_head, begin, n, e, v_b, v_h, v_n, N, E, WHOLE_E, False, DESCRIPTOR, FAR)
        acc, total, peak = fold_tile(
            acc, total, peak, query, query_rest, key, key_rest, value, begin + tl.arange(0, N),
            scale, inner, outer, first, last, base, keep, stands, slope,
            False, M, N, D2, SOFTCAP, ALIBI, NEGATIVE, KEEP, DEAD, INTERPRET,
        )  # fmt: skip
    for t in tl.range(cut_from, cut_to):
        begin = cut_start(t, head_low, heads, start, left, full_high, N)
        key = load_tile(k, batch, key_head, begin, n, d, k_b, k_h, k_n, N, D, WHOLE_D, True, DESCRIPTOR, FAR)
        key_rest = key
        if D2 > 0:
            key_rest = load_tile(
                k + D, batch, key_head, begin, n, d - D, k_b, k_h, k_n, N, D2, WHOLE_D2, True, False, FAR
            )
        if SHARED:
            value = key
        else:
            value = load_tile(v, batch, key_head, begin, n, e, v_b, v_h, v_n, N, E, WHOLE_E, True, DESCRIPTOR, FAR)
        acc, total, peak = fold_tile(
            acc, total, peak, query, query_rest, key, key_rest, value, begin + tl.arange(0, N),
            scale, inner, outer, first, last, base, keep, stands, slope,
            True, M, N, D2, SOFTCAP, ALIBI, NEGATIVE, KEEP, DEAD, INTERPRET,
        )  # fmt: skip

    across = tl.arange(0, E)
    line = (batch * h + head).to(tl.int64) * m + i
    there = exists[:, None] & (across < e)[None, :]
    if SPLIT:
        mean, log_sum = finish(acc, total, peak)
        place = line * splits + part
        tl.store(logs + place, log_sum, mask=exists)
        tl.store(parts + place[:, None] * e + across[None, :], mean, mask=there)
    else:
        blind = total == 0
        if SINK:
            score = tl.load(sink + batch * sink_b + head, mask=exists, other=0.0).to(tl.float32)
            acc, total, peak = add_sink_score(acc, total, peak, score * 1.4426950408889634)
        mean, log_sum = finish(acc, total, peak)
        log_sum *= 0.6931471805599453
        if SINK:
            # A row without keys keeps the sink exactly, which log2 and back would round.
            log_sum = tl.where(blind, score, log_sum)
        tl.store(lse + line, log_sum, mask=exists)
        tl.store(out + line[:, None] * e + across[None, :], mean.to(out.dtype.element_ty), mask=there)


@triton.jit
def merge_parts(
    parts, logs, sink, sink_at, out, lse, place, stride, count, line, e,
    S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """Merge ``count`` parts of one row, which lie ``stride`` rows apart from ``place`` on, and add a sink there.

    S: a power of two that ``count`` does not exceed. BLOCK: parts that are read at once.
    """
    each = tl.arange(0, S)
    across = tl.arange(0, E)
    log = tl.load(logs + place + each * stride, mask=each < count, other=-float("inf"))
    if S <= BLOCK:  # read before it is known what for: one latency, not two
        part = tl.load(
            parts + (place + each * stride)[:, None] * e + across[None, :],
            mask=(each < count)[:, None] & (across < e)[None, :], other=0.0,
        )  # fmt: skip
    top = tl.max(log, 0)
    blind = top == -float("inf")
    if SINK:
        score = tl.load(sink + sink_at).to(tl.float32)
        top = tl.maximum(top, score * 1.4426950408889634)
    shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(log - shift)
    total = tl.sum(weight, 0)
    if SINK:
        total += tl.exp2(score * 1.4426950408889634 - shift)
    if S <= BLOCK:
        mean = tl.sum(weight[:, None] * part, 0)
    else:
        mean = tl.zeros([E], tl.float32)
        for begin in tl.range(0, count, BLOCK):
            one = begin + tl.arange(0, BLOCK)
            share_of = tl.exp2(tl.load(logs + place + one * stride, mask=one < count, other=-float("inf")) - shift)
            some = tl.load(
                parts + (place + one * stride)[:, None] * e + across[None, :],
                mask=(one < count)[:, None] & (across < e)[None, :], other=0.0,
            )  # fmt: skip
            mean += tl.sum(share_of[:, None] * some, 0)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    log_sum = tl.where(empty, -float("inf"), (shift + tl.log2(total)) * 0.6931471805599453)
    if SINK:
        log_sum = tl.where(blind, score, log_sum)
    tl.store(lse + line, log_sum)
    tl.store(out + line * e + across, (mean / total).to(out.dtype.element_ty), mask=across < e)


@planned
@triton.jit(do_not_specialize=["m", "sink_b", "splits"], do_not_specialize_on_alignment=["sink"])
def few_merge_kernel(
    parts, logs, sink, out, lse, sink_b, h, m, e, splits,
    S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, SINK: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query of one head, and add its sink."""
    if WAIT:
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    head = line // m
    merge_parts(
        parts, logs, sink, head // h * sink_b + head % h, out, lse, line * splits, 1, splits, line, e, S, BLOCK, E, SINK
    )
