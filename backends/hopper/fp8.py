"""Attention to e4m3 heads on sm_90: what it serves, what it declines, and the way to the kernel.

Forward only, and apart from `attention`, since its inputs carry scales. See `longspan.spec.attention_quantised`.
Shapes: b batch, h query heads, g key heads, m queries, n keys, d head dimension, e value dimension.
"""

import math
from typing import Final

import torch
from torch import Tensor

from longspan.spec import AttentionState, Quantised
from longspan.spec.bounds import check_fit
from longspan.spec.checks import check_attention, check_tensors, refuse, same_device
from longspan.spec.masks import Mask, everything
from longspan.spec.quantise import E4M3, check_quantised

from ..flash.lowering import Lowered, lower
from ..flash.rope_kernel import on
from ..registry import serve
from .attention import DTYPES, OUT_DTYPES
from .launch import LONGEST, OTHERS, declines_address
from .values import GROUP, Values, laid_out

WIDEST: Final = 256  # of a head: a tile's rows are held whole
STEP: Final = 16  # of head dimensions: the bytes that the copy engine wants of strides


def quantise(q: Tensor, k: Tensor, v: Tensor, *, signs: Tensor | None = None) -> tuple[Quantised, Quantised, Values]:
    """Quantise the heads of a problem, a scale a head, values laid out for the tensor cores.

    Args:
        q: ``[b, h, m, d]`` in fp16, bf16 or fp32, with a unit last stride.
        k: ``[b, g, n, d]``.
        v: ``[b, g, n, e]``.
        signs: Turn queries and keys, which must be fp16 or bf16, by ``hadamard(·, signs)`` on the way; see
            `longspan.spec.random_signs`.

    Returns:
        What `attention_quantised` takes; of q and k, what `longspan.spec.quantise` returns, bit for bit unless turned.

    Raises:
        ValueError: For what is no attention problem, and signs that are not one for each coordinate.
        Unsupported: For what `declines_quantise` names.
    """
    serve(declines_quantise(q, k, v, signs=signs), OTHERS)
    from .quantise_launch import quantised  # noqa: PLC0415 - kernels are of no use on other machines

    signs = None if signs is None else signs.float().contiguous()
    with on(q.device):
        return (
            Quantised(*quantised(q, signs)),
            Quantised(*quantised(k, signs)),
            Values(*quantised(v, values=True), v.shape[2]),
        )


def attention_quantised(
    q: Quantised,
    k: Quantised,
    v: Quantised | Values,
    *,
    mask: Mask = everything(),  # noqa: B008 - an immutable value
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    k_offset: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> AttentionState:
    """Attend to quantised heads; see `longspan.spec.attention_quantised`.

    Args:
        q: ``[b, h, m, d]``, one scale a head, as k and v.
        k: ``[b, g, n, d]``.
        v: ``[b, g, n, e]``; as `quantise` lays it out, or it is laid out in this call.
        mask: Which keys a query sees: causal, a window, or all.
        scale: Multiplies ``q · k``; 1/√d by default.
        softcap: Declined.
        sink: Declined; `add_sink` adds it to the state.
        alibi: Declined.
        q_offset: Position of the first query.
        k_offset: Position of the first key given.
        out_dtype: Dtype of ``out``.

    Returns:
        ``out [b, h, m, e]`` and ``lse [b, h, m]`` float32, contiguous; they have no gradient.

    Raises:
        ValueError: For what means nothing, as the specification.
        Unsupported: For what `declines_attention_quantised` names.
    """
    serve(
        declines_problem(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
            q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
        ),
        OTHERS,
    )  # fmt: skip
    seen = lowered(mask, q, k, q_offset, k_offset)
    serve(declines_mask(seen), OTHERS)
    from .fp8_forward import forward  # noqa: PLC0415

    with on(q.values.device):
        laid = v if isinstance(v, Values) else laid_out(v)
        factor = 1 / math.sqrt(q.values.shape[3]) if scale is None else scale
        return AttentionState(*forward(q, k, laid, seen, factor, out_dtype))


def declines_quantise(q: Tensor, k: Tensor, v: Tensor, *, signs: Tensor | None = None) -> str | None:
    """Say why `quantise` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing.
    """
    check_attention(
        q, k, v, scale=None, softcap=None, sink=None, alibi=None, q_offset=None, k_offset=0, out_dtype=None
    )  # fmt: skip
    if signs is not None:
        check_tensors(signs=signs)
        same_device(q=q, signs=signs)
        if list(signs.shape) != [q.shape[3]]:
            refuse("signs", f"one number for each coordinate, [{q.shape[3]}]", list(signs.shape))
    if q.dtype not in (*DTYPES, torch.float32):
        return f"hopper.quantise reads fp16, bf16 and fp32, got {q.dtype}"
    if signs is not None and (q.dtype not in DTYPES or q.shape[3] & (q.shape[3] - 1) or q.shape[3] < STEP):
        return f"hopper.quantise turns fp16 and bf16 heads of 16, 32, … 256 coordinates, got {q.dtype} {q.shape[3]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.device.type != "cuda":
            return f"hopper.quantise runs on a GPU, got tensors on {x.device}"
        if x.shape[3] % STEP or x.shape[3] > WIDEST or x.shape[2] > LONGEST or x.stride(3) != 1:
            return (
                f"hopper.quantise serves head dimensions in steps of {STEP} up to {WIDEST}, {LONGEST} tokens and "
                f"a last stride of 1, got {list(x.shape)} with strides {list(x.stride())} of {name}"
            )
    return None


def declines_attention_quantised(
    q: Quantised, k: Quantised, v: Quantised | Values, *,
    mask: Mask = everything(), scale: float | None = None, softcap: float | None = None, sink: Tensor | None = None,  # noqa: B008
    alibi: Tensor | None = None, q_offset: int | Tensor | None = None, k_offset: int = 0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str | None:  # fmt: skip
    """Say why `attention_quantised` would raise `Unsupported`, or None.

    Raises:
        ValueError: For what means nothing, as the specification.
    """
    reason = declines_problem(
        q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    return reason or declines_mask(lowered(mask, q, k, q_offset, k_offset))


def declines_problem(
    q: Quantised, k: Quantised, v: Quantised | Values, *, mask: Mask, scale: float | None, softcap: float | None,
    sink: Tensor | None, alibi: Tensor | None, q_offset: int | Tensor | None, k_offset: int, out_dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Say why the kernel does not serve a problem under any mask, or None."""
    heads = [shaped(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    check_attention(
        *heads, scale=scale, softcap=softcap, sink=sink, alibi=alibi,
        q_offset=q_offset, k_offset=k_offset, out_dtype=out_dtype,
    )  # fmt: skip
    check_fit(mask, q.values.shape[0], q.values.shape[2], q_offset)
    if q.values.device.type != "cuda":
        return f"hopper.attention_quantised runs on a GPU, got tensors on {q.values.device}"
    options = [("softcap", softcap), ("alibi", alibi), ("sink (add_sink adds it to the state)", sink)]
    given = [name for name, value in options if value is not None]
    if given:
        return f"hopper.attention_quantised does not serve {given[0]}"
    if out_dtype not in OUT_DTYPES:
        return f"hopper.attention_quantised returns fp16, bf16 or fp32, got out_dtype {out_dtype}"
    if scale is not None and scale < 0:
        return f"hopper.attention_quantised serves scales from 0, got {scale}"
    if torch.compiler.is_compiling():
        return "hopper.attention_quantised is no operator that torch.compile could record"
    return next((reason for name, x in (("q", q), ("k", k), ("v", v)) if (reason := declines_heads(name, x))), None)


def declines_heads(name: str, x: Quantised | Values) -> str | None:
    """Say why the kernel does not read these heads, or None."""
    if isinstance(x, Quantised) and x.block is not None:
        return f"hopper.attention_quantised serves one scale a head, got blocks of {x.block} tokens of {name}"
    width, tokens = (x.values.shape[2], x.n) if isinstance(x, Values) else (x.values.shape[3], x.values.shape[2])
    if width % STEP or width > WIDEST:
        return f"hopper.attention_quantised serves head dimensions in steps of {STEP} up to {WIDEST}, got {width}"
    if tokens > LONGEST:
        return f"hopper.attention_quantised counts at most {LONGEST} tokens, got {tokens} of {name}"
    if not x.values.numel() or (name == "v" and isinstance(x, Quantised)):
        return None  # nothing to address, or it will be copied
    return declines_address(name, x.values, "attention_quantised")


def lowered(mask: Mask, q: Quantised, k: Quantised, q_offset: int | Tensor | None, k_offset: int) -> Lowered:
    """The mask as integers."""
    (b, _, m, _), n = q.values.shape, k.values.shape[2]
    return lower(mask, b, m, n, q_offset=q_offset, k_offset=k_offset, device=q.values.device)


def declines_mask(seen: Lowered) -> str | None:
    """Say why the kernel does not serve a mask, or None."""
    if seen.rows is None and seen.sequences is None:
        return None
    return "hopper.attention_quantised serves masks that are alike for every sequence: causal, a window, or none"


def shaped(name: str, x: Quantised | Values) -> Tensor:
    """Stand-in of the shape and device of quantised heads, for checks of a problem."""
    if isinstance(x, Values):
        check_tensors(values=x.values, scale=x.scale)
        b, g, e, whole = x.values.shape
        if x.values.dtype != E4M3 or whole != -(-x.n // GROUP) * GROUP or list(x.scale.shape) != [b, g, 1]:
            refuse(f"{name}", "Values as quantise makes them", f"{x.values.dtype} {list(x.values.shape)}, n = {x.n}")
        shape = (b, g, x.n, e)
    else:
        check_quantised(**{name: x})
        shape = x.values.shape
    return torch.empty((), dtype=torch.bfloat16, device=x.values.device).expand(shape)
