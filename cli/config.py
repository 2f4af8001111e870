"""Reading a published config.json, and planning what to run for each kind of layer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from longspan.spec import Rotation, hf
from longspan.spec.hf.fields import find, language
from longspan.spec.hf.parameters import Parameters, parameters
from longspan.spec.masks import Mask

from .page import Refused, refused

LONGEST: Final = 2**31  # positions that angles are exact below


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One kind of layer of a model, on one device at one context length.

    Attributes:
        kind: Its name in the configuration.
        layer: Its sizes.
        rotation: How it rotates, or None.
        rope: The configuration's rope mapping of it, or None.
        dtype: Of queries, keys and values.
        device: Where it runs.
    """

    kind: str
    layer: hf.Layer
    rotation: Rotation | None
    rope: Parameters | None
    dtype: torch.dtype
    device: torch.device

    @property
    def mask(self) -> Mask:
        """Which keys a query sees."""
        return hf.mask(self.layer)

    @property
    def width(self) -> int | None:
        """Most keys that any query sees, or None where that grows with the context."""
        spans = [size for size in (self.layer.window, self.layer.chunk) if size is not None]
        return min(spans) + (self.layer.ahead or 0) if spans and self.layer.ahead is not None else None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of attention; sinks are drawn, since configurations do not carry weights."""
        softmax = 1.0 if self.rotation is None else self.rotation.softmax_factor
        return {
            "mask": self.mask,
            "scale": self.layer.scale * softmax,
            "softcap": self.layer.softcap,
            "sink": self.sink(),
        }

    def sink(self) -> Tensor | None:
        """One logit per head, where the layer has sinks."""
        if not self.layer.sinks:
            return None
        return torch.randn(self.layer.heads, generator=torch.Generator().manual_seed(1)).to(self.device)

    def bytes_of(self, queries: int, keys: int) -> int:
        """Size of so many queries and of so many keys and values."""
        layer = self.layer
        numbers = queries * layer.heads * layer.head_dim + keys * layer.groups * (layer.head_dim + layer.value_dim)
        return numbers * self.dtype.itemsize


def read(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        Refused: For a path that holds no JSON object.
    """
    if path.is_dir():
        refused("config", "a JSON file", f"the directory {path} (its config.json, perhaps)")
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        refused("config", "a JSON file", f"{path}, which does not exist")
    except OSError as error:
        refused("config", "a file that can be read", f"{path}: {error.strerror}")
    except UnicodeDecodeError:
        refused("config", "a JSON file in UTF-8", f"{path}, which is no text")
    except RecursionError:
        refused("config", "a JSON file of some reasonable depth", f"{path}, which is nested too deeply")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        refused("config", "a complete JSON file", f"{path}, which stops being JSON at {where}: {error.msg}")
    if not isinstance(config, dict):
        kinds = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
        refused("config", "a JSON object, the contents of a config.json", kinds.get(type(config), "null"))
    return config


def plans(config: Mapping[str, Any], context: int, device: torch.device) -> dict[str, Plan]:
    """Plan every kind of layer.

    Raises:
        Refused: For a context that makes no sense, or a configuration that the specification refuses.
    """
    if not 1 <= context < LONGEST:
        refused("context", f"a number of tokens from 1 to {LONGEST - 1}", context)
    try:
        rotations, layers = hf.rotations(config, length=context), hf.layers(config)
        rope = parameters(language(config))
    except ValueError as error:
        raise Refused(str(error)) from None
    dtype = find_dtype(language(config))
    return {
        kind: Plan(
            kind=kind, layer=layer, dtype=dtype, device=device,
            rotation=None if layer.rotation is None else rotations[layer.rotation].to(device),
            rope=None if layer.rotation is None else rope[layer.rotation],
        )
        for kind, layer in layers.items()
    }  # fmt: skip


def find_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Dtype that the configuration names; bfloat16 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    allowed = ("bfloat16", "float16", "float32")
    if name not in allowed:
        refused("config key 'torch_dtype'", f"one of {', '.join(allowed)}", repr(name))
    return getattr(torch, name)


def trained_context(config: Mapping[str, Any], rope: Parameters | None) -> int | None:
    """Tokens that the planes were trained on, before any scaling; None where the configuration does not say."""
    inside = None if rope is None else rope.keys.get("original_max_position_embeddings")
    known = inside or find(language(config), "original_max_position_embeddings") or target_context(config)
    return None if known is None else int(known)


def target_context(config: Mapping[str, Any]) -> int | None:
    """Tokens that the configuration is made for; None where it does not say."""
    keys = language(config)
    said = find(keys, "max_position_embeddings")
    rope = keys.get("rope_parameters") or keys.get("rope_scaling")
    if said is None or not isinstance(rope, Mapping):
        return said
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    # Files to which a user adds a scaling keep the trained length there, and mean the scaled one.
    return int(max(said, factor * original)) if factor and original else int(said)
