# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Attention over a paged cache (PagedAttention, Kwon et al. 2023, arXiv:2309.06180, §4.1).

Shapes: tokens of all sequences' queries together, b sequences, h query heads, g key heads, d head, e value dimension.
"""

import math
from collections.abc import Hashable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.checks import check_attention, check_lengths, check_pages, check_ragged
from longspan.spec.masks import Causal, Chunks, Mask, Prefix, Window, check_join, check_mask, documents, everything
from longspan.spec.paged import gather

from .attention import LONGEST, contiguous, one_batch
from .autograd import revealed
from .decode import WIDEST, alike, fits, merge_flags, pieces
from .decode_choices import PagedChoice, choose_paged, paged_key
from .fitting import fitting
from .launch import INTERPRETED, Call, describable, describe, padded, quiet
from .lowering import FARTHEST
from .paged_kernel import paged_kernel, paged_merge_kernel
from .plan import Bound, Sightings, layout, memory, recall, remember
from .rope import DTYPES, serve
from .rope_function import PLAIN, transformed, watched
from .rope_kernel import on

REPEATED: Final[dict[Any, "Repeated"]] = memory()  # what `asked` returns, to how it was launched
SEEN: Final = Sightings()
SEQUENCES: Final = 2**16  # every program holds the lengths of all


class Sight(NamedTuple):
    """A mask in the coordinates of each sequence: ``max(i + low, 0, …) <= j < min(i + high, length, …)``.

    Attributes:
        low: Where row 0 of a sequence starts to see.
        high: Key before which row 0 stops to see.
        prefix: Keys that every row sees, and causally after them; -1 is no such limit.
        keep: First keys that stay visible.
        chunks: Sizes of chunks outside whose own a row sees nothing.
    """

    low: int
    high: int
    prefix: int
    keep: int
    chunks: tuple[int, ...]

    @property
    def reach(self) -> int:
        """Keys that one row sees at most."""
        wide = min([self.high - self.low, *self.chunks]) if self.prefix < 0 else FARTHEST
        return min(wide + self.keep, FARTHEST)


def sight(mask: Mask) -> Sight:
    """Lower a mask of ragged sequences: of any term but documents, lengths and spans, which these bring or exclude."""
    low, high, prefix, keep, chunks = -FARTHEST, FARTHEST, -1, 0, []
    for term in mask.terms:
        match term:
            case Causal():
                high = min(high, 1)
            case Window(size, ahead, first):
                low, high, keep = max(low, 1 - size), min(high, ahead + 1), first
            case Prefix(length):
                prefix = min(length, FARTHEST)
            case Chunks(size):
                chunks.append(min(size, FARTHEST))
            case _:
                raise AssertionError(term)
    return Sight(max(low, -FARTHEST), high, prefix, min(keep, FARTHEST), tuple(chunks))


def attention_paged(
    q: Tensor,
    q_lengths: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> AttentionState:
    """Attend to the first ``lengths[b]`` keys of each sequence's pages; see `longspan.spec.attention_paged`.

    Args:
        q: ``[tokens, h, d]`` in fp16, bf16 or fp32, any strides with a unit last one; not copied, as the pools.
        q_lengths: Queries of each sequence, as for the other integers int32 or int64.
        k_pages: Pool of key pages ``[pages, g, page, d]``; free slots may hold anything.
        v_pages: Pool of value pages ``[pages, g, page, e]``.
        table: Pages of each sequence ``[b, ·]``. On a GPU entries are not checked, for that would stall it.
        lengths: Keys of each sequence.
        mask: Which keys a query sees, in coordinates of its sequence.
        scale: See `attention`, as for the rest.
        softcap: See `attention`.
        sink: See `attention`.
        alibi: See `attention`.
        out_dtype: See `attention`.
        deterministic: See `attention`.

    Returns:
        ``out [tokens, h, e]`` and ``lse [tokens, h]`` float32, contiguous.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention_paged` names.
    """
    given = (q, q_lengths, k_pages, v_pages, table, lengths)
    key = asked(given, mask, scale, softcap, sink, alibi, out_dtype)
    if key is not None and (again := recall(REPEATED, key)) is not None:
        with on(q.device):
            state = again(*given, contiguous(sink), contiguous(alibi))
        if state is not None:
            return AttentionState(*state)
    q, k_pages, v_pages, sink, alibi = revealed(q, k_pages, v_pages, sink, alibi)
    reason = declines_attention_paged(
        q, q_lengths, k_pages, v_pages, table, lengths, mask=mask, scale=scale, softcap=softcap, sink=sink,
        alibi=alibi, out_dtype=out_dtype, deterministic=deterministic,
    )  # fmt: skip
    serve(reason)
    seen = sight(mask)
    rest = (
        q, q_lengths.to(q.device), k_pages, v_pages, table, lengths, contiguous(sink), contiguous(alibi),
        [seen.low, seen.high, seen.prefix, seen.keep, *seen.chunks],
        1 / math.sqrt(q.shape[2]) if scale is None else float(scale), None if softcap is None else float(softcap),
        q.dtype if out_dtype is None else out_dtype,
    )  # fmt: skip
    if torch.compiler.is_compiling() or type(q) not in PLAIN:
        return AttentionState(*torch.ops.longspan.flash_attention_paged(*rest))
    out, lse, again = run(*rest)
    if key is not None and again is not None and SEEN.again(key):
        remember(REPEATED, key, again)
    return AttentionState(out, lse)


def asked(
    given: tuple[Tensor, ...], mask: Mask, scale: float | None, softcap: float | None, sink: Tensor | None,
    alibi: Tensor | None, out_dtype: torch.dtype | None,
) -> tuple[Hashable, ...] | None:  # fmt: skip
    """All of a call but the contents and addresses of its tensors; None if it is watched, see `attention.asked`."""
    if type(mask) is not Mask or watched(*given, *(x for x in (sink, alibi) if x is not None)):
        return None
    if any(x.device != given[0].device for x in given):
        return None  # what is launched is a copy of it
    return (*map(layout, given), mask.terms, scale, softcap, layout(sink), layout(alibi), out_dtype)


def declines_attention_paged(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, *,
    mask: Mask = everything(), scale: float | None = None, softcap: float | None = None,  # noqa: B008
    sink: Tensor | None = None, alibi: Tensor | None = None, out_dtype: torch.dtype | None = None,
    deterministic: bool = False,  # noqa: ARG001
) -> str | None:  # fmt: skip
    """Say why `attention_paged` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    check_ragged(q=q)
    check_lengths(q_lengths=q_lengths, lengths=lengths)
    check_pages(k_pages, v_pages, table, lengths)
    check_mask(mask)
    check_join((*documents(q_lengths, lengths).terms, *mask.terms))
    keys, values = (x[:1] if x.shape[0] else x.new_empty(1, *x.shape[1:]) for x in (k_pages, v_pages))
    check_attention(
        one_batch(q), keys, values, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=None, k_offset=0, out_dtype=out_dtype,
    )  # fmt: skip
    given = [x for x in (q, k_pages, v_pages, sink, alibi) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return (
            "flash.attention_paged has no gradient, got a tensor that requires one: torch.no_grad() says it needs none"
        )
    if transformed():
        return "flash.attention_paged has no derivative and no batching rule for torch.func"
    if q.dtype not in DTYPES:
        return f"flash.attention_paged computes in float32 and serves fp16, bf16 and fp32, got {q.dtype}"
    if out_dtype is not None and out_dtype not in DTYPES:
        return f"flash.attention_paged returns fp16, bf16 or fp32, got out_dtype {out_dtype}"
    several = "flash.attention_paged serves at most two terms of chunks in one mask"
    return several if len(mask.of(Chunks)) > 2 else declines_pool(q, k_pages, v_pages, table)


def declines_pool(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor) -> str | None:
    """Say why the kernel cannot read the queries or the pools, or None."""
    d, e = q.shape[2], v_pages.shape[3]
    if not INTERPRETED and q.device.type != "cuda":
        return f"flash.attention_paged runs on a GPU, or on a CPU under TRITON_INTERPRET=1, got tensors on {q.device}"
    if d % 8 or e % 8 or not fits(d, e):
        return f"flash.attention_paged serves head dimensions in steps of 8 up to 1024, values 512, got {d} and {e}"
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if x.stride(-1) != 1 and x.numel():
            return f"flash.attention_paged reads tensors whose last stride is 1, got {list(x.stride())} of {name}"
    if table.shape[0] > SEQUENCES:
        return f"flash.attention_paged plans at most {SEQUENCES} sequences in one call, got {table.shape[0]}"
    if q.shape[0] * q.shape[1] > LONGEST or table.shape[1] * k_pages.shape[2] > LONGEST:
        return (
            f"flash.attention_paged counts at most {LONGEST} rows and keys, got {q.shape[0]} tokens"
            f" of {q.shape[1]} heads and {table.shape[1]} pages of {k_pages.shape[2]}"
        )
    return None


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run the kernels on what the operator takes."""
    return run(*arguments)[:2]


@fitting
def run(
    q: Tensor, q_lengths: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor,
    sink: Tensor | None, alibi: Tensor | None, sees: list[int], scale: float, softcap: float | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, "Repeated | None"]:  # fmt: skip
    """Launch the kernel and, where keys may have been split, the one that merges; say how to do it again.

    The workspace is at most ``2 · wanted · g · tile_m`` rows of parts, in float32, whatever the lengths are.
    """
    if INTERPRETED:
        gather(k_pages[..., :0], table, lengths)  # for its checks of values
    (tokens, h, d), (_, g, page, e), b = q.shape, v_pages.shape, lengths.shape[0]
    out = q.new_empty(tokens, h, e, dtype=out_dtype)
    lse = q.new_empty(tokens, h, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, None
    seen, group, capacity = Sight(*sees[:4], tuple(sees[4:])), h // g, table.shape[1] * page
    described = d <= WIDEST and describable(k_pages) and describable(v_pages)
    with on(q.device):
        choice = choose_paged(paged_key(q, b, g, tokens * group, capacity, page, max(d, e), described))
    tiles = -(-tokens * group // choice.tile_m) + min(b + 1, tokens)
    if choice.tile_m % group == 0:
        tiles = min(tiles, tokens)  # each has a query of its own
    reach = min(seen.reach + choice.tile_m // group + 2 * choice.tile_n, FARTHEST)
    work = (reach, capacity, choice.wanted, choice.least)
    rows = 2 * choice.wanted * g * choice.tile_m if choice.wanted > 1 else 0
    parts = lse.new_empty(rows * (e + 1))
    logs = parts[rows * e :]
    call = Call(sink, alibi, None, None, (0, 0, 0, 0, 0), scale, softcap, out_dtype)
    power, merged = max(16, 1 << b.bit_length()), None
    with on(q.device), quiet():
        attended = paged_kernel[((choice.wanted + tiles) * g,)](
            q, q_lengths, describe(k_pages, choice.tile_n, choice), describe(v_pages, choice.tile_n, choice),
            table, lengths, out, lse, parts, logs, sink, alibi,
            *q.stride()[:2], q_lengths.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3], *table.stride(),
            lengths.stride(0), b, tokens, h, group, d, e, seen.low, seen.high, seen.prefix, seen.keep,
            *(*seen.chunks, FARTHEST, FARTHEST)[:2], *call.factors, *work,
            SINK=sink is not None, B=power, EARLY=choice.early, **flags_of(call, seen, choice, k_pages, v_pages),
        )  # fmt: skip
        if rows:
            merged = paged_merge_kernel[(min(choice.wanted, tiles) * g * choice.tile_m,)](
                q_lengths, lengths, parts, logs, sink, out, lse, q_lengths.stride(0), lengths.stride(0),
                b, tokens, h, group, e, *work,
                B=power, M=choice.tile_m, N=choice.tile_n, SINK=sink is not None,
                **merge_flags(choice.wanted, e, choice.early),
            )  # fmt: skip
    if attended is None or (rows and merged is None):
        return out, lse, None
    return (
        out,
        lse,
        Repeated(attended, merged, out.new_empty(0), lse.new_empty(0), out.shape, rows, alike(k_pages, v_pages)),
    )


class Repeated(NamedTuple):
    """Launches on a paged cache, to be repeated on other tensors of the same layout.

    Attributes:
        attended: The launch over the keys.
        merged: The launch that merges; None where keys are not split.
        out: An empty tensor of the dtype and device of ``out``.
        lse: The same of ``lse``.
        shape: Shape of ``out``.
        rows: Rows of the workspace.
        shared: Whether values were the first columns of the keys, for which another kernel is compiled.
    """

    attended: Bound
    merged: Bound | None
    out: Tensor
    lse: Tensor
    shape: torch.Size
    rows: int
    shared: bool

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Launch on new results, and a new workspace; None if these tensors want another kernel."""
        if alike(given[2], given[3]) != self.shared:
            return None
        out, lse = self.out.new_empty(self.shape), self.lse.new_empty(self.shape[:2])
        parts = self.lse.new_empty(self.rows * (self.shape[2] + 1))  # kept until all is launched
        results = out.data_ptr(), lse.data_ptr()
        space = parts.data_ptr(), parts.data_ptr() + 4 * self.rows * self.shape[2]
        of = [0 if x is None else x.data_ptr() for x in given]
        launched = self.attended(*of[:6], *results, *space, *of[6:])
        if launched and self.merged is not None:
            launched = self.merged(of[1], of[5], *space, of[6], *results)
        return (out, lse) if launched else None


def flags_of(call: Call, seen: Sight, choice: PagedChoice, k_pages: Tensor, v_pages: Tensor) -> dict[str, Any]:
    """What the kernel is compiled for."""
    (page, d), e, (first, rest) = k_pages.shape[2:], v_pages.shape[3], pieces(k_pages.shape[3])
    return {
        "M": choice.tile_m, "N": choice.tile_n, "D": first, "D2": rest, "E": padded(e),
        "WHOLE_D": first <= d, "WHOLE_D2": first + rest == d, "WHOLE_E": padded(e) == e, "PAGE": page,
        "PREFIX": seen.prefix >= 0, "CHUNKS": len(seen.chunks), "KEEP": seen.keep > 0,
        "SOFTCAP": call.softcap is not None, "ALIBI": call.alibi is not None, "NEGATIVE": call.negative,
        "SHARED": alike(k_pages, v_pages), "FAR": any(choice.tile_n * x.stride(2) >= 2**31 for x in (k_pages, v_pages)),
        "DESCRIPTOR": choice.descriptors, "INTERPRET": INTERPRETED,
        "num_warps": choice.num_warps, "num_stages": choice.num_stages,
        **({"launch_pdl": True} if choice.early else {}),
    }  # fmt: skip


torch.library.define(
    "longspan::flash_attention_paged",
    "(Tensor q, Tensor q_lengths, Tensor k_pages, Tensor v_pages, Tensor table, Tensor lengths, Tensor? sink,"
    " Tensor? alibi, SymInt[] sees, float scale, float? softcap, ScalarType out_dtype) -> (Tensor, Tensor)",
)
torch.library.impl("longspan::flash_attention_paged", ("cuda", "cpu"), launch)


@torch.library.register_fake("longspan::flash_attention_paged")
def _(q: Tensor, _q_lengths: Tensor, _k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, h, _ = q.shape
    return q.new_empty(tokens, h, v_pages.shape[3], dtype=rest[-1]), q.new_empty(tokens, h, dtype=torch.float32)
