"""How calls of this backend were launched, and by what they are remembered."""

from collections.abc import Hashable
from typing import Any, Final

import torch
from torch import Tensor

from longspan.spec.masks import Mask

from ..flash.launch import Again
from ..flash.plan import Sightings, layout, memory
from ..flash.rope_function import watched

REPEATED: Final[dict[Any, Again]] = memory()  # what `asked` returns, to how it was launched
SEEN: Final = Sightings()
OFFSETS: Final = (int, type(None))


def asked(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, softcap: float | None,
    sink: Tensor | None, alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int,
    out_dtype: torch.dtype | None,
) -> tuple[Hashable, ...] | None:  # fmt: skip
    """All of a call but the contents and addresses of its tensors: what its checks read, and what is launched.

    None if autograd, a transform or a compiler watches, or if equal keys could be different calls (True is 1, but no
    offset). Terms of a mask that hold tensors equal only themselves, and are not remembered: their contents may change.
    """
    if type(mask) is not Mask or type(k_offset) is not int or type(q_offset) not in OFFSETS:
        return None
    if watched(q, k, v) or (sink is not None and watched(sink)) or (alibi is not None and watched(alibi)):
        return None
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, mask.terms, scale, softcap, layout(sink), layout(alibi),
        q_offset, k_offset, out_dtype,
    )  # fmt: skip
