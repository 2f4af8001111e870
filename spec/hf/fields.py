"""Reading keys of a published configuration, and refusing by name what is absent or makes no sense."""

from collections.abc import Mapping
from typing import Any, Final, cast

from ..checks import refuse
from .families import FAMILIES, Family

NESTS: Final = ("text_config", "thinker_config", "llm_config", "language_config")
"""Where multimodal configurations keep their language model."""

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "rope_theta": ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_emb_fraction"),
    "original_max_position_embeddings": ("original_max_position_embeddings", "initial_context_length"),
}
"""Names under which one fact is published; what the config says goes before any family's default."""

LACKING: Final[Mapping[str, str]] = {
    "dual_chunk_attention_config": "dual chunk attention",
    "rotary_emb_scale_base": "xPos",
    "use_fope": "Fourier position embedding (FoPE)",
    "xdrope_section": "XD-RoPE",
    "llama_4_scaling_beta": "a temperature that grows with the position",
}
"""Keys that change the mathematics in a way that this specification does not have."""


def language(config: object) -> dict[str, Any]:
    """Find the language model's own keys in a config that may wrap them.

    Raises:
        ValueError: If it is no mapping, or asks for mathematics that this specification lacks.
    """
    if not isinstance(config, Mapping):
        refuse("config", "a mapping, the contents of a config.json", type(config).__name__)
    keys = dict(cast("Mapping[str, Any]", config))
    for nest in NESTS:
        if isinstance(keys.get(nest), Mapping):
            return language({"model_type": keys.get("model_type"), **keys[nest]})
    for key, what in LACKING.items():
        if keys.get(key):
            refuse(f"config key {key!r}", f"absent: {what} is not supported", keys[key])
    return keys


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Look up what is known about the config's model type; None where it is unknown or absent."""
    return FAMILIES.get(str(config.get("model_type")))


def defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the code of the model's authors takes for absent keys; nothing is known of an unknown type."""
    family = family_of(config)
    return family.defaults if family else {}


def find(config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - JSON
    """Read a key under any of its published names, else the family's default; a null of the config itself is None."""
    if key in config and config[key] is None:
        return None
    names = ALIASES.get(key, (key,))
    said = (values[name] for values in (config, defaults(config)) for name in names if values.get(name) is not None)
    return next(said, None)


def number(value: object, what: str) -> float:
    """Take a JSON number; refuse anything else by name."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**53:
        refuse(what, "a finite number below 2^53", repr(value))
    return cast("float", value)


def whole(config: Mapping[str, Any], key: str, purpose: str) -> int:
    """Read a key that must be there and a whole number of at least 1.

    Raises:
        ValueError: Naming the key and what it is for.
    """
    value = find(config, key)
    if value is None:
        refuse(f"config key {key!r}, {purpose},", "given", f"none among {len(config)} keys")
    amount = number(value, f"config key {key!r}")
    if amount < 1 or amount != int(amount):
        refuse(f"config key {key!r}, {purpose},", "a whole number of at least 1", value)
    return int(amount)


def head_dim(config: Mapping[str, Any], kind: str = "all") -> int:
    """Coordinates of a query head; Gemma 4's layers of full attention have more of them."""
    for key in ("global_head_dim",) * (kind == "full_attention") + ("head_dim",):
        if find(config, key) is not None:
            return whole(config, key, "the coordinates of a head")
    if find(config, "qk_rope_head_dim") is not None:
        nope = whole(config, "qk_nope_head_dim", "the coordinates of a head that do not turn")
        return nope + whole(config, "qk_rope_head_dim", "the coordinates of a head that turn")
    size = whole(config, "hidden_size", "the width that heads divide where there is no head_dim")
    heads = whole(config, "num_attention_heads", "the number of query heads")
    if size % heads:
        refuse("config key 'hidden_size'", f"a multiple of the {heads} heads where there is no head_dim", size)
    return size // heads
