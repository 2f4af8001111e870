"""Which layers of a model are alike: their kind of attention, and whether they rotate."""

from collections.abc import Mapping
from typing import Any, Final, cast

from ..checks import refuse
from .families import Family
from .fields import find, whole

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
CHUNKED: Final = "chunked_attention"
LINEAR: Final = "linear_attention"
SPELLINGS: Final[Mapping[str, str]] = {
    FULL: FULL, "attention": FULL, "full": FULL, "global": FULL, "global_attention": FULL,
    SLIDING: SLIDING, "sliding": SLIDING, "local": SLIDING, "local_attention": SLIDING,
    CHUNKED: CHUNKED,
}  # fmt: skip
NO_ATTENTION: Final = frozenset({LINEAR, "mamba", "mamba2", "conv", "recurrent", "hybrid_mamba", "moe", "mlp"})
"""Layers that keep no keys: left out."""


def layer_types(config: Mapping[str, Any], family: Family) -> list[str]:
    """Name every layer's kind of attention, the layers that have none by their own names.

    `layer_types` of the config goes first; otherwise the rule of the model type, see `families.Pattern`.
    """
    count = whole(config, "num_hidden_layers", "the number of layers")
    said = config.get("layer_types")
    if said is None:
        return [FULL if full else partial(family) for full in full_layers(config, family, count)]
    if not isinstance(said, list | tuple) or len(cast("list[object]", said)) != count:
        refuse("layer_types", f"a list of {count} names, one a layer", repr(cast("object", said)))
    for name in cast("list[object]", said):
        if name not in SPELLINGS and name not in NO_ATTENTION:
            refuse("a name in layer_types", f"one of {sorted([*SPELLINGS, *NO_ATTENTION])}", repr(name))
    return [SPELLINGS.get(name, name) for name in cast("list[str]", said)]


def partial(family: Family) -> str:
    """Name the kind of a family's layers that do not attend to everything."""
    return {"chunked": CHUNKED, "linear": LINEAR}.get(family.pattern, SLIDING)


def full_layers(config: Mapping[str, Any], family: Family, count: int) -> list[bool]:  # noqa: C901, PLR0911 - one pattern a line
    """Which layers see everything, by the rule of the model type."""
    slides = find(config, "sliding_window") is not None and find(config, "use_sliding_window") is not False
    match family.pattern:
        case "sliding":
            return [not slides] * count
        case "every":
            full = every(config, count)
            return [here or not slides for here in full]
        case "upper":
            first = (
                0
                if find(config, "max_window_layers") == 0
                else whole(config, "max_window_layers", "the first layer that slides")
            )
            return [not slides or layer < first for layer in range(count)]
        case "linear":
            n = whole(config, "full_attention_interval", "the distance between layers of full attention")
            return [(layer + 1) % n == 0 for layer in range(count)]
        case "local":
            n = whole(config, "global_attn_every_n_layers", "the distance between layers of full attention")
            return [layer % n == 0 for layer in range(count)]
        case "chunked":
            return [not turns for turns in rotates(config, family, [FULL] * count)]
        case "still":
            return [turns or not slides for turns in rotates(config, family, [FULL] * count)]
        case "unsaid":
            if slides and find(config, "use_sliding_window"):
                refuse("config key 'layer_types'", "given where a model of this type uses a sliding window", "none")
            return [True] * count
        case "full":
            return [True] * count


def every(config: Mapping[str, Any], count: int) -> list[bool]:
    """Every n-th layer, or the layers marked G of a repeated "LLLG"; Gemma 4's and such a text's last one too."""
    pattern = find(config, "sliding_window_pattern")
    if isinstance(pattern, str):
        if not pattern or set(pattern) - {"L", "G"}:
            refuse("sliding_window_pattern", "a number, or a text of L and G", repr(pattern))
        return [pattern[layer % len(pattern)] == "G" or layer == count - 1 for layer in range(count)]
    n = whole(config, "sliding_window_pattern", "the distance between layers of full attention")
    last = str(config.get("model_type")).startswith("gemma4")
    return [(layer + 1) % n == 0 or (last and layer == count - 1) for layer in range(count)]


def rotates(config: Mapping[str, Any], family: Family, types: list[str]) -> list[bool]:
    """Which layers rotate their queries and keys, by the rule of the model type."""
    match family.nope:
        case "none":
            return [True] * len(types)
        case "full":
            return [kind != FULL or SLIDING not in types for kind in types]
        case "listed":
            listed = config.get("no_rope_layers")  # a 1 says that the layer does rotate
            if listed:
                if len(listed) != len(types):
                    refuse("no_rope_layers", f"a list of {len(types)} zeros and ones", repr(listed))
                return [bool(turns) for turns in listed]
            n = whole(config, "no_rope_layer_interval", "the distance between layers without rotation")
            return [(layer + 1) % n != 0 for layer in range(len(types))]
