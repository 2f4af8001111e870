"""The rope mapping of a published configuration, in one form whatever the key names of its time.

``rope_parameters`` (flat, or one mapping per layer kind) or ``rope_scaling`` beside ``rope_theta``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from ..checks import refuse
from .fields import LACKING, defaults, family_of, find, head_dim, number, whole

SYNONYMS: Final[Mapping[str, str]] = {"su": "longrope", "mrope": "default"}

ALWAYS: Final = frozenset({
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved",
})  # fmt: skip
INERT: Final = frozenset({"finetuned"})
"""Keys that record how a checkpoint came to be and enter no formula."""

YARN: Final = frozenset({
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
    "attn_factor", "mscale", "mscale_all_dim", "extrapolation_factor",
})  # fmt: skip
KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset({"original_max_position_embeddings"}),
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "dynamic": frozenset({
        "factor", "alpha", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    }),
    "yarn": YARN,
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({
        "factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor",
        "short_mscale", "long_mscale",
    }),
    "proportional": frozenset({"factor"}),
}  # fmt: skip
"""Every rope type that is read, and the keys that it may have."""


@dataclass(frozen=True)
class Parameters:
    """One layer kind's rope mapping, its type resolved and the numbers around it found.

    Attributes:
        kind: The rope type, one of `KNOWN`.
        base: RoPE base θ.
        d: Coordinates that the rotation covers.
        keys: The mapping itself.
        config: The config it stands in.
    """

    kind: str
    base: float
    d: int
    keys: Mapping[str, Any]
    config: Mapping[str, Any]

    def get(self, key: str, default: float | None = None) -> float | None:
        """Read an optional number of the mapping."""
        value = self.keys.get(key)
        return default if value is None else number(value, f"rope key {key!r}")

    def need(self, key: str, purpose: str) -> float:
        """Read a number that this rope type cannot do without."""
        value = self.get(key)
        if value is None:
            refuse(f"rope key {key!r}, {purpose},", f"given for rope type {self.kind!r}", sorted(self.keys))
        return cast("float", value)

    def original(self) -> int:
        """Trained context length; in the mapping, or beside it (Phi-3, gpt-oss)."""
        inside, beside = (
            self.get("original_max_position_embeddings"),
            find(self.config, "original_max_position_embeddings"),
        )
        if inside is None and beside is None:
            self.need("original_max_position_embeddings", "the trained context length")
        if inside is not None and beside is not None and inside != beside:
            refuse(
                "original_max_position_embeddings",
                "the same in the rope mapping and beside it",
                f"{inside} and {beside}",
            )
        trained = number(inside if beside is None else beside, "original_max_position_embeddings")
        if trained < 1 or trained != int(trained):
            refuse("original_max_position_embeddings", "a whole number of at least 1", trained)
        return int(trained)


def parameters(config: Mapping[str, Any]) -> dict[str, Parameters]:
    """Read the rope mapping of every layer kind; the key is ``"all"`` where there is one."""
    return {kind: resolve(config, kind, keys) for kind, keys in mappings(config).items()}


def mappings(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Tell the rope mappings of a config apart by layer kind."""
    rope = published(config)
    nested = {kind: cast("Mapping[str, Any]", keys) for kind, keys in rope.items() if isinstance(keys, Mapping)}
    if nested:
        flat = sorted(key for key, value in rope.items() if key not in nested and value is not None)
        if flat:
            refuse("rope_parameters", "either one mapping or one per layer kind", f"{sorted(nested)} and {flat}")
        return {"all": next(iter(nested.values()))} if len(nested) == 1 else nested
    family = family_of(config)
    for local, wide in (("rope_local_base_freq", "rope_theta"), ("local_rope_theta", "global_rope_theta")):
        if find(config, local) is not None:
            near = {"rope_theta": find(config, local)}  # ModernBERT's code scales both kinds, Gemma 3's the far-sighted
            return {
                "full_attention": {"rope_theta": find(config, wide), **rope},
                "sliding_attention": {**rope, **near} if local == "local_rope_theta" else near,
            }
    if family and family.local_unscaled and type_of(rope) != "default":
        theta = rope.get("rope_theta", find(config, "rope_theta"))
        return {"full_attention": rope, "sliding_attention": {"rope_theta": theta}}
    return {"all": rope}


def published(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Read ``rope_parameters`` or ``rope_scaling``; absent or null is an empty mapping."""
    both = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    for key, value in both.items():
        if not isinstance(value, Mapping):
            refuse(f"config key {key!r}", "a mapping or null", repr(value))
    if len(both) == 2 and both["rope_parameters"] != both["rope_scaling"]:
        refuse("rope_parameters and rope_scaling", "one of them, or equal", "two different mappings")
    return cast("Mapping[str, Any]", next(iter(both.values()), defaults(config).get("rope_parameters", {})))


def resolve(config: Mapping[str, Any], kind: str, keys: Mapping[str, Any]) -> Parameters:
    """Check a rope mapping key by key, and find its base and its coordinates."""
    rope_type = type_of(keys)
    for key, value in keys.items():
        if key in LACKING and value:
            refuse(f"rope key {key!r}", f"absent: {LACKING[key]} is not supported", value)
        if key not in KNOWN[rope_type] | ALWAYS | INERT and value is not None:
            refuse(
                f"key {key!r} of rope type {rope_type!r}", f"one of {sorted(KNOWN[rope_type] | ALWAYS | INERT)}", value
            )
    base = keys.get("rope_theta")
    base = find(config, "rope_theta") if base is None else base
    if base is None:
        refuse("config key 'rope_theta', the base of RoPE,", "given where the model type has no known default", "none")
    if find(config, "rotary_scaling_factor") is not None:
        rope_type, keys = "dynamic", {"factor": config["rotary_scaling_factor"], **keys}
    return Parameters(rope_type, number(base, "rope_theta"), covered(config, kind, rope_type, keys), keys, config)


def type_of(keys: Mapping[str, Any]) -> str:
    """Name the scaling method of a rope mapping by today's name."""
    named = [str(keys[key]) for key in ("rope_type", "type") if keys.get(key) is not None]
    types = {SYNONYMS.get(name, name) for name in named} or {"default"}
    if types == {"yarn"} and keys.get("short_factor") is not None:
        types = {"longrope"}  # what the first Phi-3 files called it
    if len(types) > 1:
        refuse("rope_type and type", "the same", " and ".join(named))
    (rope_type,) = types
    if rope_type not in KNOWN:
        refuse("rope type", f"one of {', '.join([*KNOWN, *SYNONYMS])}", repr(rope_type))
    return rope_type


def covered(config: Mapping[str, Any], kind: str, rope_type: str, keys: Mapping[str, Any]) -> int:
    """Coordinates of a head that the rotation covers: all, a part, or a part set aside for it (MLA)."""
    if find(config, "qk_rope_head_dim") is not None:
        return whole(config, "qk_rope_head_dim", "the coordinates of a head that turn")
    d = head_dim(config, kind)
    if rope_type == "proportional":
        return d
    part = keys.get("partial_rotary_factor")
    if part is None and config.get("rotary_dim") is not None:
        d, part = whole(config, "rotary_dim", "the coordinates of a head that turn"), 1.0
    part = number(
        next(x for x in (part, find(config, "partial_rotary_factor"), 1.0) if x is not None), "partial_rotary_factor"
    )
    if not 0 < part <= 1:
        refuse("partial_rotary_factor", "above 0 and at most 1", part)
    return int(d * part)
