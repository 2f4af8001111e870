"""From a published configuration to the rotation of each of its layer kinds.

Where libraries read one file differently, this reads it as its authors' code does; the choices are
said where they are made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import torch
from jaxtyping import Int64
from torch import Tensor

from .. import scaling
from ..checks import check_count, refuse
from ..ramp import temperature
from ..rope import Rotation
from .fields import language, number, whole
from .parameters import Parameters, parameters


def rotations(config: Mapping[str, Any], *, length: int) -> dict[str, Rotation]:
    """Read how every layer kind rotates at a context of ``length`` tokens.

    Args:
        config: Contents of a config.json, multimodal ones included.
        length: Tokens of the whole sequence, cache and prompt; it matters to dynamic NTK and LongRoPE alone.

    Returns:
        A rotation per layer kind (``"full_attention"``, ``"sliding_attention"``, …), or ``"all"`` where there is one.

    Raises:
        ValueError: For a key that is absent, unknown, contradicted, or asks for mathematics that is not here.
    """
    check_count("length, the tokens of the context,", length, 1)
    keys = language(config)
    return {kind: rotation(p, length) for kind, p in parameters(keys).items()}


def rotation(p: Parameters, length: int) -> Rotation:
    """Apply one rope mapping's scaling method, and its M-RoPE sections if it has any."""
    made = METHODS[p.kind](p, length)
    section = p.keys.get("mrope_section")
    if section is None:
        return made
    if str(p.config.get("model_type")).startswith("ernie4_5_vl"):
        refuse("M-RoPE of Ernie 4.5 VL", "absent: its order of axes is not supported", section)
    if not isinstance(section, list | tuple) or not all(isinstance(x, int) for x in cast("Sequence[object]", section)):
        refuse("rope key 'mrope_section'", "a list of whole numbers", repr(cast("object", section)))
    interleaved = bool(p.keys.get("mrope_interleaved"))
    return replace(made, axis=axes(cast("Sequence[int]", section), made.inv_freq.shape[-1], interleaved=interleaved))


def axes(section: Sequence[int], planes: int, *, interleaved: bool) -> Int64[Tensor, " p"]:
    """Which position axis (time, height, width) drives each plane (M-RoPE, arXiv:2409.12191, §2.1).

    In chunks, one axis after the other; interleaved (Qwen3-VL), planes take time, height, width by
    turns until height and width have had their number, and time has the rest.
    """
    if sum(section) != planes or min(section) < 0 or (interleaved and len(section) != 3):
        refuse(
            "rope key 'mrope_section'",
            f"{'3 ' if interleaved else ''}numbers that add up to the {planes} planes",
            section,
        )
    if not interleaved:
        return torch.arange(len(section)).repeat_interleave(torch.tensor(section))
    plane = torch.arange(planes)
    turn = plane % 3
    return torch.where(plane < 3 * torch.tensor(section)[turn], turn, 0)


def plain(p: Parameters, _length: int) -> Rotation:
    """Read ``default``."""
    return scaling.none(p.d, base=p.base)


def linear(p: Parameters, _length: int) -> Rotation:
    """Read ``linear``."""
    return scaling.linear(p.d, base=p.base, factor=p.need("factor", "how many times longer the context becomes"))


def dynamic(p: Parameters, length: int) -> Rotation:
    """Read ``dynamic``: a fixed NTK where there is an ``alpha`` (HunYuan), else one that follows the length.

    The trained length is `max_position_embeddings`, unless the file has a name for it.
    """
    alpha = p.get("alpha")
    if alpha is not None:
        return scaling.ntk(p.d, base=p.base, factor=alpha)
    if p.config.get("max_trained_positions") is not None:
        original = whole(p.config, "max_trained_positions", "the trained context length")
    elif p.get("original_max_position_embeddings") is not None:
        original = p.original()
    else:
        original = whole(p.config, "max_position_embeddings", "the trained context length of rope type 'dynamic'")
    factor = p.need("factor", "the slope of the stretch")
    return scaling.dynamic_ntk(p.d, base=p.base, factor=factor, original=original, length=length)


def yarn(p: Parameters, _length: int) -> Rotation:
    """Read ``yarn``.

    An explicit ``attention_factor`` goes before ``mscale``. ``attn_factor`` multiplies the temperature,
    as in the code of YaRN's authors. Models with latent attention follow DeepSeek's code: `mscale`
    is 1 and `mscale_all_dim` 0 where absent, and the latter also enters the softmax scale, squared.
    """
    if p.get("extrapolation_factor", 1.0) != 1:
        refuse("rope key 'extrapolation_factor'", "1", p.keys["extrapolation_factor"])
    original, factor = p.original(), p.get("factor")
    if factor is None:
        factor = whole(p.config, "max_position_embeddings", "the context length over the trained one") / original
    mscale, all_dim = p.get("mscale"), p.get("mscale_all_dim")
    latent = p.config.get("kv_lora_rank") is not None
    attention_factor, times = p.get("attention_factor"), p.get("attn_factor")
    if attention_factor is None and latent:
        attention_factor = temperature(factor, 1.0 if mscale is None else mscale) / temperature(factor, all_dim or 0.0)
    if times is not None:
        if attention_factor is not None:
            refuse("rope key 'attn_factor'", "absent beside attention_factor and latent attention", times)
        attention_factor = times * temperature(factor)
    return scaling.yarn(
        p.d, base=p.base, factor=factor, original=original,
        beta_fast=p.get("beta_fast") or 32.0, beta_slow=p.get("beta_slow") or 1.0,
        truncate=p.keys.get("truncate") is not False,
        attention_factor=attention_factor, mscale=mscale, mscale_all_dim=all_dim,
        softmax_mscale=all_dim if latent and all_dim else None,
    )  # fmt: skip


def llama3(p: Parameters, _length: int) -> Rotation:
    """Read ``llama3``."""
    return scaling.llama3(
        p.d, base=p.base, original=p.original(), factor=p.need("factor", "how many times slower slow planes turn"),
        low_freq_factor=p.need("low_freq_factor", "turns below which a plane is slowed down in full"),
        high_freq_factor=p.need("high_freq_factor", "turns above which a plane keeps its speed"),
    )  # fmt: skip


def longrope(p: Parameters, length: int) -> Rotation:
    """Read ``longrope``: the long factors for the whole sequence as soon as it is longer than trained."""
    original, factor = p.original(), p.get("factor")
    if factor is None:
        factor = whole(p.config, "max_position_embeddings", "the context length over the trained one") / original
    return scaling.longrope(
        p.d, base=p.base, original=original, length=length, factor=factor,
        short_factor=divisors(p, "short_factor"), long_factor=divisors(p, "long_factor"),
        attention_factor=p.get("attention_factor"),
        short_mscale=p.get("short_mscale"), long_mscale=p.get("long_mscale"),
    )  # fmt: skip


def divisors(p: Parameters, key: str) -> list[float]:
    """Read a list of LongRoPE factors."""
    values = p.keys.get(key)
    if not isinstance(values, list | tuple):
        refuse(f"rope key {key!r}", f"a list of {p.d // 2} numbers for rope type 'longrope'", repr(values))
    return [number(value, f"rope key {key!r}") for value in cast("Sequence[object]", values)]


def proportional(p: Parameters, _length: int) -> Rotation:
    """Read ``proportional``."""
    fraction, factor = p.get("partial_rotary_factor", 1.0), p.get("factor", 1.0)
    return scaling.proportional(p.d, base=p.base, fraction=cast("float", fraction), factor=cast("float", factor))


METHODS: Final[Mapping[str, Callable[[Parameters, int], Rotation]]] = {
    "default": plain, "linear": linear, "dynamic": dynamic, "yarn": yarn, "llama3": llama3, "longrope": longrope,
    "proportional": proportional,
}  # fmt: skip
