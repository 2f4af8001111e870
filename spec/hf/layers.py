"""What attention needs to know about each kind of layer of a published configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from .. import masks
from ..checks import PAIRINGS, refuse
from ..pairing import Pairing
from .families import FAMILIES, Family
from .fields import family_of, find, head_dim, language, number, whole
from .kinds import CHUNKED, FULL, NO_ATTENTION, SLIDING, layer_types, rotates
from .parameters import Parameters, parameters


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Attention of the layers of one kind; sizes are coordinates of a head, or tokens.

    Attributes:
        count: How many layers there are of this kind.
        heads: Query heads.
        groups: Key-value heads; latent attention has as many as query heads once its latent is expanded.
        head_dim: Coordinates of a query or key.
        value_dim: Coordinates of a value.
        rotary_dim: Coordinates that the rotation covers, twice its planes; 0 where there is none.
        rotation: Key of this kind's rotation in `rotations`, or None: the layer has none.
        window: Keys up to the query's own that a query sees: ``i - window < j``; None is all of them.
        ahead: Keys after its own that a query sees where attention is not causal; None is all of them.
        chunk: A query sees keys of its own chunk of so many positions; None is all of them.
        causal: Whether a query sees no key after its own.
        softcap: Bound of the scores, or None.
        sinks: Whether every head has a learned sink logit.
        scale: Softmax scale, before the rotation's `softmax_factor`.
        pairing: Which coordinates form a plane.
        cached_dim: Numbers that one token leaves in the cache of one layer.
        omits: Config keys that change this layer in ways that this description does not hold.
    """

    count: int
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    rotation: str | None
    window: int | None
    ahead: int | None
    chunk: int | None
    causal: bool
    softcap: float | None
    sinks: bool
    scale: float
    pairing: Pairing
    cached_dim: int
    omits: tuple[str, ...]


def layers(config: Mapping[str, Any], *, pairing: Pairing | None = None) -> dict[str, Layer]:
    """Read the attention of every kind of layer.

    Layers without attention (Qwen3-Next's linear ones) are left out. In latent attention (MLA) the coordinates
    that turn are described apart from the head, whose place in it is the implementation's.

    Args:
        config: Contents of a config.json, multimodal ones included.
        pairing: Which coordinates form a plane; only for a model type that this package does not know.

    Returns:
        A layer per kind (``"full_attention"``, ``"sliding_attention"``, …, with ``"_nope"`` for those
        of a kind that do not rotate while others do), or ``"all"`` where there is one.

    Raises:
        ValueError: For a key that is absent or makes no sense, or a model type whose pairing is not known.
    """
    keys = language(config)
    family = known(keys, pairing)
    types = layer_types(keys, family)
    turning = rotates(keys, family, types)
    rope = parameters(keys)
    kinds = [kind for kind in zip(types, turning, strict=True) if kind[0] not in NO_ATTENTION]
    if not kinds:
        refuse("layer_types", "with attention in some layer", sorted(set(types)))
    found = {
        (kind, turns): layer(keys, family, rope, kind, kinds.count((kind, turns)), turns=turns)
        for kind, turns in dict.fromkeys(kinds)
    }
    if len(found) == 1:
        return {"all": next(iter(found.values()))}
    mixed = {kind for kind, turns in found if (kind, not turns) in found}
    return {kind + "_nope" * (kind in mixed and not turns): one for (kind, turns), one in found.items()}


def known(config: Mapping[str, Any], pairing: Pairing | None) -> Family:
    """Find the facts of the model type, or take the caller's word for the pairing of an unknown one."""
    family = family_of(config)
    if pairing is not None and pairing not in PAIRINGS:
        refuse("pairing", " or ".join(PAIRINGS), repr(pairing))
    if family is None:
        if pairing is None:
            refuse(
                "model_type",
                f"one of {', '.join(FAMILIES)}, or anything where pairing='half' or 'interleaved' is passed",
                repr(config.get("model_type")),
            )
        if "layer_types" not in config and config.get("sliding_window") is not None:
            refuse("config key 'layer_types'", "given for an unknown model type with a sliding_window", "none")
        return Family(cast("Pairing", pairing))
    if isinstance(config.get("rotary_emb_interleaved"), bool):  # nomic's files are the ones that do say
        family = replace(family, pairing="interleaved" if config["rotary_emb_interleaved"] else "half")
    if pairing is not None and pairing != family.pairing:
        refuse(f"pairing of model type {config['model_type']!r}", family.pairing, pairing)
    return family


def layer(
    config: Mapping[str, Any],
    family: Family,
    rope: Mapping[str, Parameters],
    kind: str,
    count: int,
    *,
    turns: bool,
) -> Layer:
    """Describe the ``count`` layers of one kind."""
    heads = whole(config, "num_attention_heads", "the number of query heads")
    latent = find(config, "kv_lora_rank") is not None
    groups = heads if latent else key_heads(config, kind, heads)
    d = head_dim(config, kind)
    value = whole(config, "v_head_dim", "the coordinates of a value") if latent else d
    rotation = kind if kind in rope else "all"
    if rotation not in rope:
        refuse(f"rope_parameters of {kind!r} layers", "given where other kinds have theirs", sorted(rope))
    covered = rope[rotation].d if turns else 0
    if latent:
        rank = whole(config, "kv_lora_rank", "the width of the cached latent")
        cached = rank + whole(config, "qk_rope_head_dim", "the coordinates of a head that turn")
    else:
        cached = groups * (d + value)
    window, ahead, causal = sight(config, family, kind)
    softcap = find(config, "attn_logit_softcapping")
    return Layer(
        count=count, heads=heads, groups=groups, head_dim=d, value_dim=value, rotary_dim=covered,
        rotation=rotation if turns else None, window=window, ahead=ahead, causal=causal,
        chunk=whole(config, "attention_chunk_size", "the positions of a chunk") if kind == CHUNKED else None,
        softcap=None if softcap is None else number(softcap, "attn_logit_softcapping"),
        sinks=family.sinks, scale=scale_of(config, family, d),
        pairing=family.pairing, cached_dim=cached, omits=omitted(config, turns=turns),
    )  # fmt: skip


def key_heads(config: Mapping[str, Any], kind: str, heads: int) -> int:
    """Key-value heads; Gemma 4's layers of full attention can have fewer, and none said are as many as queries'."""
    wide = kind == FULL and find(config, "attention_k_eq_v") and find(config, "num_global_key_value_heads") is not None
    key = "num_global_key_value_heads" if wide else "num_key_value_heads"
    groups = heads if find(config, key) is None else whole(config, key, "the number of key-value heads")
    if heads % groups:
        refuse(f"config key {key!r}", f"a divisor of the {heads} query heads", groups)
    return groups


def sight(config: Mapping[str, Any], family: Family, kind: str) -> tuple[int | None, int | None, bool]:
    """How many keys a query sees up to its own and after it, and whether that is causal.

    All causal windows of Hugging Face's code are ``j > i - sliding_window``: as many keys as the number
    says, the query's own included. Two-sided ones see as many keys on either side as half of theirs.
    """
    causal = family.causal and find(config, "use_bidirectional_attention") not in {True, "all"}
    if kind != SLIDING:
        return None, (0 if causal else None), causal
    if family.pattern == "local":
        half = whole(config, "local_attention", "the width of a two-sided window") // 2
        return half + 1, half, causal
    window = whole(config, "sliding_window", "the keys that a query of a sliding layer sees")
    if causal:
        return window, 0, causal
    half = window // 2 + 1  # Gemma 3's and 4's code, whose two-sided bounds include both ends
    return half + 1, half, causal


def scale_of(config: Mapping[str, Any], family: Family, d: int) -> float:
    """Softmax scale: the config's, the model type's, or 1 / √head_dim."""
    if find(config, "attention_multiplier") is not None:  # Granite
        return number(config["attention_multiplier"], "attention_multiplier")
    if family.scale is not None:
        return family.scale
    return (
        whole(config, "query_pre_attn_scalar", "the square of 1 / scale") ** -0.5
        if find(config, "query_pre_attn_scalar") is not None
        else d**-0.5
    )


def omitted(config: Mapping[str, Any], *, turns: bool) -> tuple[str, ...]:
    """Name the keys that change attention in ways that `Layer` has no field for."""
    tuned = not turns and find(
        config, "attn_temperature_tuning"
    )  # Llama 4 scales queries of its layers without rotation
    shared = find(config, "num_kv_shared_layers")  # Gemma 4's last layers reuse the keys of earlier ones
    sparse = find(config, "index_topk")  # DeepSeek V3.2 attends to the keys that an indexer picks
    vision = find(config, "use_bidirectional_attention") == "vision"
    facts = {
        "attn_temperature_tuning": tuned,
        "num_kv_shared_layers": shared,
        "index_topk": sparse,
        "use_bidirectional_attention": vision,
    }
    return tuple(key for key, here in facts.items() if here)


def mask(layer: Layer) -> masks.Mask:
    """Which keys a query of such a layer sees, for `attention`."""
    seen = masks.causal() if layer.causal else masks.everything()
    if layer.window is not None:
        seen = seen & masks.window(layer.window, ahead=layer.ahead or 0)
    if layer.chunk is not None:
        seen = seen & masks.chunks(layer.chunk)
    return seen
