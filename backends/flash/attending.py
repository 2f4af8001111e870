"""From a call of attention to its launch: again as a call before it, where nobody watches, or else from nothing.

Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from longspan.spec import AttentionState
from longspan.spec.masks import Mask, Term

from ..registry import serve
from . import decode
from .autograd import Two, revealed
from .decode_choices import LEAST
from .growing import Launch, form
from .kin import Kin, Sizes
from .launch import Call
from .lowering import lower
from .plan import layout, recall, remember
from .reach import NOTHING, Given, Lowered, Reach, any_sees, reach, told
from .rope_function import watched
from .rope_kernel import on

OFFSETS: Final = (int, type(None))


# A call: all but its sizes, and these; and its mask as terms and tensors, see `reach.told`.
Ask = tuple[tuple[Hashable, ...], tuple[Any, ...], tuple[Term, ...], Given]


class Attending(NamedTuple):
    """How a backend attends.

    Attributes:
        call: Names what the launchers take beside tensors.
        declines: Says why a call is not served, or None.
        launch: Launches on tensors that nobody watches.
        attend: Attends through autograd.
        code: All that code and tiles depend on of the sizes of a call with many queries; see `growing.form`.
        alternatives: Backends that may serve what this one declines.
        known: Calls that were launched, by all but their sizes: a `plan.memory` of the backend's own.
    """

    call: Callable[..., Any]
    declines: Callable[..., str | None]
    launch: Callable[..., Two]
    attend: Callable[..., Two]
    code: Callable[..., Hashable]
    alternatives: tuple[str, ...]
    known: dict[Any, Kin]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float | None,
        sink: Tensor | None, alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int,
        out_dtype: torch.dtype | None, *more: Any,
    ) -> AttentionState:  # fmt: skip
        """Attend; ``more`` is what the operator takes beside `autograd.REST`."""
        ask = asked(q, k, v, mask, scale, softcap, sink, alibi, q_offset, k_offset, out_dtype)
        if ask is not None and (kin := recall(self.known, ask[0])) is not None:
            _, sizes, _, given = ask
            launch = kin.find(sizes)
            if launch is None:
                options = scale, softcap, sink, alibi, q_offset, out_dtype, *more
                launch = self.resized(kin, Sizes(*sizes), given, q, k, v, *options)
            if launch is not None:
                with on(q.device):
                    state = launch(q, k, v, contiguous(sink), contiguous(alibi), given, q_offset)
                if state is not None:
                    return AttentionState(*state)
        q, k, v, sink, alibi = revealed(q, k, v, sink, alibi)
        reason = self.declines(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
            q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
        )  # fmt: skip
        serve(reason, self.alternatives)
        seen = lower(mask, q.shape[0], q.shape[2], k.shape[2], q_offset=q_offset, k_offset=k_offset, device=q.device)
        rest = contiguous(sink), contiguous(alibi), seen.rows, seen.sequences, tuple(seen.interval)
        rest += (*numbers(q, scale, softcap, out_dtype), *more)
        return AttentionState(*(self.attend(q, k, v, *rest) if ask is None else self.first(ask, seen, q, k, v, *rest)))

    def first(self, ask: Ask, seen: Lowered, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Two:
        """Launch a call from nothing, and keep how if it can be launched again."""
        key, sizes, terms, _ = ask
        sizes = Sizes(*sizes)
        # Rows and sequences may be others next time: only what can be lowered again is launched again.
        integers = seen.rows is None and seen.sequences is None
        call = replace(self.call(*rest), wanted=integers or seen.again is not None)
        state = self.launch(call, q, k, v)
        if call.again is not None:
            of = form(self.tiles(q, k, v, lambda: call), q.shape[0], sizes, call.interval, not integers)
            if of is not None:
                kin = recall(self.known, key) or Kin(reach(terms))
                known = any_sees(q.shape[2], k.shape[2], *call.interval)
                kin.learn(sizes, of, Launch(call.again, seen.again, known))
                remember(self.known, key, kin)
        return state

    def resized(
        self, kin: Kin, sizes: Sizes, given: Given, q: Tensor, k: Tensor, v: Tensor, scale: float | None,
        softcap: float | None, sink: Tensor | None, alibi: Tensor | None, q_offset: int | Tensor | None,
        out_dtype: torch.dtype | None, *more: Any,
    ) -> Launch | None:  # fmt: skip
        """Take the launch of a call that is kin to this one's sizes; None if none is launched alike."""
        m, n, *_ = sizes
        sees: Reach = kin.sees
        rows = given.q_lengths is not None or not sees.moves
        each = not rows and (given.lengths is not None or isinstance(q_offset, Tensor))
        lowered = rows or each
        interval = (-m, n, n, 0, sees.keep) if lowered else sees.interval(m, n, sizes.q_offset, sizes.k_offset)

        def call() -> Call:
            """What code depends on of a call, which asks of rows and sequences only whether there are any."""
            rest = *numbers(q, scale, softcap, out_dtype), *more
            return self.call(sink, alibi, k if rows else None, k if each else None, interval, *rest)

        before, launch = kin.last
        launch = launch and launch.longer(before, sizes, interval)
        if launch is not None:
            kin.last = sizes, launch
            return launch
        alike = kin.forms.get(form(self.tiles(q, k, v, call), q.shape[0], sizes, interval, lowered))
        if alike is None:
            return None
        launch = alike.resized(sizes, interval, sees, q, k, v, given, q_offset)
        kin.last = sizes, launch
        return launch

    def tiles(self, q: Tensor, k: Tensor, v: Tensor, call: Callable[[], Call]) -> Hashable:
        """All that tiles and parts depend on of a call's sizes."""
        return (q.shape[2], -(-k.shape[2] // LEAST)) if decode.few(q, k, v) else self.code(call(), q, k, v)


def asked(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float | None,
    sink: Tensor | None, alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int,
    out_dtype: torch.dtype | None,
) -> Ask | None:  # fmt: skip
    """Split a call.

    None if autograd, a transform or a compiler watches, if equal keys could be different calls (True is 1, but no
    offset), and if nobody could launch it again.
    """
    if type(mask) is not Mask or type(k_offset) is not int or watched(q, k, v):
        return None
    of_offsets = None
    if type(q_offset) not in OFFSETS:
        if not isinstance(q_offset, Tensor) or watched(q_offset):
            return None
        of_offsets, q_offset = layout(q_offset), None
    terms = told(mask)
    if terms is None or not q.ndim == k.ndim == v.ndim == 4:
        return None
    terms, given = terms
    if sink is not None or alibi is not None or given is not NOTHING:
        for x in (sink, alibi, *given):
            if x is not None and watched(x):
                return None
    of_given = None if given is NOTHING else tuple(map(layout, given))
    (b, h, m, d), (of_k, g, n, of_d), (of_v, of_g, values, e) = q.shape, k.shape, v.shape
    key = (
        b, h, d, of_k, g, of_d, of_v, of_g, e, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, terms,
        scale, softcap, layout(sink), layout(alibi), of_given, of_offsets, out_dtype,
    )  # fmt: skip
    return key, (m, n, values, q.stride(), k.stride(), v.stride(), q_offset, k_offset), terms, given


def numbers(
    q: Tensor, scale: float | None, softcap: float | None, out_dtype: torch.dtype | None
) -> tuple[float, float | None, torch.dtype]:
    """Scale, softcap and dtype of out, as `Call` has them."""
    return (
        1 / math.sqrt(q.shape[3]) if scale is None else float(scale), None if softcap is None else float(softcap),
        q.dtype if out_dtype is None else out_dtype,
    )  # fmt: skip


def contiguous(x: Tensor | None) -> Tensor | None:
    """Lay a number per head out densely: h numbers."""
    return None if x is None else x.contiguous()
