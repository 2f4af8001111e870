# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Few queries against many keys: decoding, speculation, the last chunk of a prompt. The keys are split over programs.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .decode_choices import FewChoice, choose_few, few_key, processors
from .decode_kernel import few_kernel, few_merge_kernel
from .fitting import fitting
from .kin import Sizes
from .launch import (
    INTERPRETED,
    Call,
    all_seen,
    describable,
    describe,
    longer,
    numbers_of,
    padded,
    per_sequence,
    renumbered,
)
from .plan import Bound

WIDEST: Final = 256  # of a head whose row is held whole
WIDEST_KEY: Final = 1024  # of a head in two pieces, the first a power of two
WIDEST_VALUE: Final = 512
FEW: Final = 32  # queries
FEW_INTERPRETED: Final = 7  # so that the other kernels, too, have their share of the laws' small problems
CHUNK: Final = 256  # queries of a prompt's chunk that may leave half of the multiprocessors idle, and is split then
TALL: Final = 128  # queries of a tile of the kernel that does not split
ROWS: Final = 128  # queries times the heads that share a key head: two row tiles, which read every key twice


def few(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the queries are so few that the keys are split over programs; from shapes alone."""
    (b, h, m, d), (_, g, n, _), e = q.shape, k.shape, v.shape[3]
    if max(d, e) > WIDEST:
        return m <= FEW and fits(d, e)
    if INTERPRETED:
        return m <= FEW_INTERPRETED
    if m <= FEW:
        return m * h <= ROWS * g and n >= 4 * m
    # Of as many keys as queries this asks nothing of a size that an exported graph leaves open.
    if n < 16 * m or m > CHUNK or q.element_size() == 4:
        return False
    return 2 * b * h * -(-m // TALL) <= processors(q.device.index or 0)


def fits(d: int, e: int) -> bool:
    """Whether the kernel of few queries holds heads of these dimensions."""
    return d <= WIDEST_KEY and e <= WIDEST_VALUE


def widest(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> int:
    """Largest head dimension that is served on these shapes."""
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sink))
    wide = max(q.shape[3], v.shape[3]) > WIDEST
    return WIDEST_KEY if wide and not learns and few(q, k, v) else WIDEST


def pieces(d: int) -> tuple[int, int]:
    """Cut a head dimension into a power of two and, beyond WIDEST, a rest; both padded as tiles are."""
    if d <= WIDEST:
        return padded(d), 0
    first = 1 << (d.bit_length() - 1)
    return first, 0 if first == d else padded(d - first)


def alike(k: Tensor, v: Tensor) -> bool:
    """Whether values are the first columns of the keys, as in absorbed multi-head latent attention: read once then."""
    return v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and v.shape[3] == pieces(k.shape[3])[0]


def flags_of(call: Call, choice: FewChoice, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What the kernel is compiled for."""
    (m, d), (n, e), (first, rest) = q.shape[2:], v.shape[2:], pieces(q.shape[3])
    return {
        "M": choice.tile_m, "N": choice.tile_n, "D": first, "D2": rest, "E": padded(e),
        "WHOLE_D": first <= d, "WHOLE_D2": first + rest == d, "WHOLE_E": padded(e) == e,
        "ROWS": call.rows is not None, "EACH": call.sequences is not None, "KEEP": call.lowered.keep > 0,
        "SOFTCAP": call.softcap is not None, "SINK": call.sink is not None, "ALIBI": call.alibi is not None,
        "NEGATIVE": call.negative, "DEAD": not all_seen(call.lowered, m, n), "SHARED": alike(k, v),
        "DESCRIPTOR": choice.descriptors, "FAR": any(choice.tile_n * x.stride(2) >= 2**31 for x in (k, v)),
        "SPLIT": choice.splits > 1, "EARLY": choice.early, "INTERPRET": INTERPRETED,
        "num_warps": choice.num_warps, "num_stages": choice.num_stages,
        **({"launch_pdl": True} if choice.early else {}),
    }  # fmt: skip


@fitting
def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend where `few` says so: ``out [b, h, m, e]`` contiguous, and ``lse [b, h, m]`` float32.

    The workspace is a mean ``[b, h, m, splits, e]`` and a log-sum-exp ``[b, h, m, splits]`` in float32.
    """
    (b, h, m, d), (_, g, n, e) = q.shape, v.shape
    out = q.new_empty(b, h, m, e, dtype=call.out_dtype)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    described = d <= WIDEST and describable(k) and describable(v)
    choice = choose_few(few_key(q, b * g, m * h // g, n, max(d, e), described))
    splits = choice.splits
    parts, logs = out, lse
    if splits > 1:
        parts = lse.new_empty(lse.numel() * splits * (e + 1))
        logs = parts[lse.numel() * splits * e :]
    attended = few_kernel[(b * g * -(-(m * h // g) // choice.tile_m) * splits,)](
        q, describe(k, choice.tile_n, choice), describe(v, choice.tile_n, choice), out, lse, parts, logs,
        call.sink, call.alibi, call.rows, call.sequences, *numbers_of(call, q, k, v), splits,
        **flags_of(call, choice, q, k, v),
    )  # fmt: skip
    merged = None
    if splits > 1:
        merged = few_merge_kernel[(b * h * m,)](
            parts, logs, call.sink, out, lse, per_sequence(call.sink), h, m, e, splits,
            **merge_flags(splits, e, choice.early), SINK=call.sink is not None,
        )  # fmt: skip
    if call.wanted and attended is not None and (splits == 1 or merged is not None):
        empty = out.new_empty(0), lse.new_empty(0)
        call.keep(Repeated(attended, merged, *empty, (b, h, m, e), splits, alike(k, v)))
    return out, lse


class Repeated(NamedTuple):
    """Launches of few queries, to be repeated on other tensors; see `launch.Again`.

    Attributes:
        attended: The launch over the keys.
        merged: The launch that merges; None where keys are not split.
        out: An empty tensor of the dtype and device of ``out``.
        lse: The same of ``lse``.
        shape: Shape of ``out``.
        splits: Programs that share the keys of a row tile.
        shared: Whether values were the first columns of the keys, for which another kernel is compiled.
    """

    attended: Bound
    merged: Bound | None
    out: Tensor
    lse: Tensor
    shape: tuple[int, int, int, int]
    splits: int
    shared: bool

    def resized(self, sizes: Sizes, interval: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> "Repeated":
        """Take the code to a problem of as many queries that differs in sizes alone; see `growing.form`."""
        attended = self.attended
        numbers = renumbered(attended.numbers, self.shape[0], sizes, interval)
        attended = attended.resized(attended.grid, numbers, q, k, v)
        return Repeated(attended, *self[1:])

    def longer(self, n: int, interval: tuple[int, ...]) -> "Repeated":
        """Take the code to n keys in the same places; see `growing.Launch.longer`."""
        numbers = longer(self.attended.numbers, n, interval)
        return Repeated(self.attended.longer(numbers, n), *self[1:])

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, alibi: Tensor | None,
        sequences: Tensor | None = None, rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Launch on new results, and a new workspace; None if these tensors want another kernel."""
        if alike(k, v) != self.shared:
            return None
        out, lse = self.out.new_empty(self.shape), self.lse.new_empty(self.shape[:3])
        of_sink, of_out, of_lse = 0 if sink is None else sink.data_ptr(), out.data_ptr(), lse.data_ptr()
        of_parts, of_logs = of_out, of_lse
        if self.merged is not None:
            lines = lse.numel() * self.splits
            parts = self.lse.new_empty(lines * (self.shape[3] + 1))  # kept until all is launched
            of_parts, of_logs = parts.data_ptr(), parts.data_ptr() + 4 * lines * self.shape[3]
        launched = self.attended(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), of_out, of_lse, of_parts, of_logs,
            of_sink, 0 if alibi is None else alibi.data_ptr(), 0 if rows is None else rows.data_ptr(),
            0 if sequences is None else sequences.data_ptr(),
        )  # fmt: skip
        if launched and self.merged is not None:
            launched = self.merged(of_parts, of_logs, of_sink, of_out, of_lse)
        return (out, lse) if launched else None


def merge_flags(splits: int, e: int, early: bool) -> dict[str, Any]:
    """What a kernel that merges parts is compiled for."""
    power = max(2, 1 << (splits - 1).bit_length())
    block = max(2, min(power, 4096 // padded(e)))
    return {
        "S": power, "BLOCK": block, "E": padded(e), "WAIT": early, "num_warps": 4,
        **({"launch_pdl": True} if early else {}),
    }  # fmt: skip
