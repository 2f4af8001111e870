"""FlashAttention as a fold over tiles of keys, in pure tensors: the theorem that the kernels rely on.

Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867, Algorithm 3) carries a running maximum and
sum, so that a row of scores is never whole anywhere (Dao et al. 2022, arXiv:2205.14135, Algorithm 1;
Dao 2023, arXiv:2307.08691, Algorithm 1). Whatever the tiling, the result is `attention`.
Shapes: b batch, g key heads, r query heads of each, m queries of a tile, n keys of a tile, e value dimension.
"""

from functools import reduce
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .attention import penalty, scores
from .bounds import Bounds, bounds, visible
from .checks import check_attention, floating, refuse
from .masks import Mask, everything
from .state import AttentionState, add_sink


class Fold(NamedTuple):
    """Attention to the tiles read so far, not yet divided: the registers of a kernel.

    ``peak`` is the largest score so far, ``total`` the sum of exp(score - peak), ``acc`` that sum weighted by
    the values.
    """

    peak: Float[Tensor, "b g r m"]
    total: Float[Tensor, "b g r m"]
    acc: Float[Tensor, "b g r m e"]


def attention_tiled(
    q: Float[Tensor, "b h m d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n e"],
    *,
    tile_m: int,
    tile_n: int,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " h"] | None = None,
    alibi: Float[Tensor, " h"] | None = None,
    q_offset: int | Int[Tensor, " b"] | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype | None = None,
) -> AttentionState:
    """Attend tile by tile; equal to `attention`, with its arguments, for every tile size.

    Args:
        q: Queries, cut into tiles of ``tile_m`` rows.
        k: Keys, cut into tiles of ``tile_n``.
        v: Values.
        tile_m: Queries of a tile.
        tile_n: Keys of a tile.
        mask: See `attention`, as for the rest.
        scale: See `attention`.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        q_offset: See `attention`.
        k_offset: See `attention`.
        out_dtype: See `attention`.
    """
    if tile_m < 1 or tile_n < 1:
        refuse("tile_m and tile_n", "at least 1", f"{tile_m} and {tile_n}")
    check_attention(
        q, k, v, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    (b, h, m, _), (_, g, n, e) = q.shape, v.shape
    seen = bounds(mask, b, m, n, q_offset=q_offset, k_offset=k_offset, device=q.device)

    def row_tile(rows: slice) -> AttentionState:
        """Fold every key tile into one tile of queries."""
        here = Bounds(seen.first[:, rows], seen.last[:, rows], seen.base[:, rows], seen.keep, seen.position[:, rows])
        query = q[:, :, rows].to(floating(q))

        def step(fold: Fold, start: int) -> Fold:
            """Read one tile of keys."""
            keys = slice(start, min(start + tile_n, n))
            kind = classify(here, keys)
            if kind == "empty":
                return fold
            shown = Bounds(here.first - start, here.last - start, here.base - start, here.keep, here.position - start)
            hidden = ~visible(shown, keys.stop - keys.start)
            # A dead slot may hold NaN, and 0 · NaN is not 0.
            dead = rearrange(hidden.all(1), "b n -> b 1 n 1")
            key, value = (x[:, :, keys].to(query.dtype).masked_fill(dead, 0.0) for x in (k, v))
            score = scores(query, key, scale=scale, softcap=softcap)
            if alibi is not None:
                score = score - penalty(alibi.to(score.dtype), shown, key)
            return absorb(fold, score if kind == "full" else hide(score, hidden), value)

        nothing = torch.zeros(b, g, h // g, query.shape[2], dtype=query.dtype, device=q.device)
        start = Fold(nothing - torch.inf, nothing, repeat(nothing, "b g r m -> b g r m e", e=e))
        return finish(reduce(step, range(0, n, tile_n), start))

    tiles = [row_tile(slice(start, start + tile_m)) for start in range(0, max(m, 1), tile_m)]
    state = AttentionState(*(torch.cat(parts, dim=2) for parts in zip(*tiles, strict=True)))
    state = state if sink is None else add_sink(state, sink)
    return AttentionState(state.out.to(q.dtype if out_dtype is None else out_dtype), state.lse)


def absorb(fold: Fold, score: Float[Tensor, "b g r m n"], value: Float[Tensor, "b g n e"]) -> Fold:
    """Add a tile of keys: rescale what was summed under the old peak (FlashAttention-2, Algorithm 1, lines 9-10)."""
    peak = torch.maximum(fold.peak, score.amax(-1))
    # A row that has seen no key yet has no peak; any finite one will do.
    finite = peak.masked_fill(peak == -torch.inf, 0.0)
    rescale = (fold.peak - finite).exp()
    weight = (score - rearrange(finite, "... m -> ... m 1")).exp()
    acc = rearrange(rescale, "... m -> ... m 1") * fold.acc
    return Fold(
        peak=peak,
        total=rescale * fold.total + weight.sum(-1),
        acc=acc + einsum(weight, value, "b g r m n, b g n e -> b g r m e"),
    )


def finish(fold: Fold) -> AttentionState:
    """Divide once, at the end: ``out = acc / total`` and ``lse = peak + ln total``."""
    empty = fold.total == 0
    total = fold.total.masked_fill(empty, 1.0)
    out = fold.acc / rearrange(total, "... m -> ... m 1")
    lse = (fold.peak.masked_fill(empty, 0.0) + total.log()).masked_fill(empty, -torch.inf)
    return AttentionState(rearrange(out, "b g r m e -> b (g r) m e"), rearrange(lse, "b g r m -> b (g r) m"))


def hide(score: Float[Tensor, "b g r m n"], hidden: Bool[Tensor, "b m n"]) -> Float[Tensor, "b g r m n"]:
    """Mask a tile that some row sees only in part."""
    return score.masked_fill(rearrange(hidden, "b m n -> b 1 1 m n"), -torch.inf)


def classify(seen: Bounds, keys: slice) -> Literal["empty", "full", "cut"]:
    """Say, by comparing integers, whether rows see none, all, or some of the keys ``[start, stop)`` of a tile.

    An empty tile is skipped and a full one needs no mask: exactly, since a row's keys are one interval and one head.
    """
    body = (seen.first < keys.stop) & (seen.last > keys.start) & (seen.first < seen.last)
    stop = torch.minimum(seen.base + seen.keep, seen.last)
    head = (seen.base < keys.stop) & (stop > keys.start) & (seen.base < stop)
    if not (body | head).any():
        return "empty"
    # The head and the body together may fill a tile where they touch.
    joined = (seen.base <= keys.start) & (stop >= seen.first) & (seen.last >= keys.stop)
    whole = (
        ((seen.first <= keys.start) & (seen.last >= keys.stop))
        | ((seen.base <= keys.start) & (stop >= keys.stop))
        | joined
    )
    return "full" if whole.all() else "cut"
