"""From a call of attention to the forward kernel: what it is compiled for, descriptors, results.

Shapes: b batch, h query heads, g key heads, m queries, n keys, e value dimension.
"""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from longspan.autotune import overridden

from ..flash.decode_choices import processors
from ..flash.kin import Sizes
from ..flash.launch import per_sequence
from ..flash.plan import Bound
from .choices import Variant, variant
from .forward_kernel import forward_kernel
from .launch import Call, describe
from .spans import FIELDS, spans

LEAST: Final = 1e-37  # a scale of 0 would make NaN of a score of -inf; this one makes every other score 0 as well


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: ``out [b, h, m, e]`` contiguous, and ``lse [b, h, m]`` float32."""
    (b, h, m, _), (_, g, n, e) = q.shape, v.shape
    out = q.new_empty(b, h, m, e, dtype=call.out_dtype)
    lse = q.new_empty(b, h, m, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if n == 0:
        return blind(call, out, lse)
    form = variant(call, q, k, v)
    tiles = -(-m // (form.W * form.M))
    total, programs = tiles * b * h, processors(q.device.index)
    # Each launch counts its own tiles, from zero; where there are programs for all of them, none is counted.
    counter = lse.view(torch.int32) if total <= programs else torch.zeros(1, dtype=torch.int32, device=q.device)
    plan, found = (counter, None) if call.rows is None else spans(call, m, n, form.W, form.M, form.N)
    sink, alibi = (None if x is None else x.float() for x in (call.sink, call.alibi))
    bound = forward_kernel[(min(total, programs),)](
        describe(q, form.M, form.D), describe(k, form.N, form.D), describe(v, form.N, form.E),
        describe(out.view(b * h, m, e), form.M, form.E) if form.STAGED else out, out, lse,
        lse if sink is None else sink, lse if alibi is None else alibi,
        counter if call.rows is None else call.rows, counter if call.sequences is None else call.sequences,
        plan, counter, total, tiles, h, h // g, m, b, e, *call.interval, int(sink is not None), int(alibi is not None),
        per_sequence(sink), per_sequence(alibi), *factors_of(call, form), C=form, num_warps=4,
    )  # fmt: skip
    dense = (call.rows is None or found is not None) and sink is call.sink and alibi is call.alibi
    # Where the heuristic serves because what was tuned does not fit, sizes are told apart for other tiles than these.
    if call.wanted and dense and bound is not None and not overridden():
        empty, tall = (out.new_empty(0), lse.new_empty(0)), form.W * form.M
        call.keep(Repeated(bound, *empty, (b, h, m, e), tall, programs, found))
    return out, lse


class Layout(NamedTuple):
    """Shape and strides of a contiguous tensor that is not there yet."""

    shape: tuple[int, ...]

    def stride(self) -> tuple[int, ...]:
        """Strides."""
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))


class Repeated(NamedTuple):
    """A launch of the forward kernel, to be repeated on other tensors; see `flash.launch.Again`.

    Attributes:
        bound: The launch.
        out: An empty tensor of the dtype and device of ``out``.
        lse: The same of ``lse``.
        shape: Shape of ``out``.
        tall: Queries of a tile.
        programs: What the device runs at once, as many as are launched unless there are fewer tiles.
        spans: The launch that finds the tiles of rows; None without rows.
    """

    bound: Bound
    out: Tensor
    lse: Tensor
    shape: tuple[int, ...]
    tall: int
    programs: int
    spans: Bound | None

    def resized(self, sizes: Sizes, interval: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> "Repeated":
        """Take the code to a problem that differs in sizes alone; see `flash.growing.form`."""
        (b, h, _, e), m, numbers = self.shape, sizes.m, self.bound.numbers
        tiles = -(-m // self.tall)
        bound = self.bound.resized(
            (min(tiles * b * h, self.programs),),
            (tiles * b * h, tiles, *numbers[2:4], m, b, e, *interval, *numbers[12:]),
            q, k, v, Layout((b * h, m, e)),
        )  # fmt: skip
        spans = self.spans and self.spans.resized((tiles, b), (m, b * m, sizes.n, interval[4]))
        return self._replace(bound=bound, shape=(b, h, m, e), spans=spans)

    def longer(self, n: int, interval: tuple[int, ...]) -> None:
        """Say that this code depends on more of the number of keys; see `flash.launch.Again`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, alibi: Tensor | None,
        sequences: Tensor | None = None, rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Launch on new results, with a counter of its own."""
        out, lse = self.out.new_empty(self.shape), self.lse.new_empty(self.shape[:3])
        result, unused = out.data_ptr(), lse.data_ptr()
        counted = self.bound.numbers[0] > self.programs
        counter = self.lse.new_zeros(1) if counted else lse  # the bits of 0.0 are those of 0
        of_rows = of_spans = unused
        if rows is not None and self.spans is not None:
            tiles, b = self.spans.grid[:2]
            spans = rows.new_empty((b, tiles, FIELDS))  # kept until all is launched
            of_rows, of_spans = rows.data_ptr(), spans.data_ptr()
            if not self.spans(of_rows, of_spans):
                return None
        launched = self.bound(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), result, result, unused,
            unused if sink is None else sink.data_ptr(), unused if alibi is None else alibi.data_ptr(),
            of_rows, unused if sequences is None else sequences.data_ptr(), of_spans, counter.data_ptr(),
        )  # fmt: skip
        return (out, lse) if launched else None


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
