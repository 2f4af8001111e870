"""A configuration without a meaning is refused in one sentence that names the key.

Under test the shapes and types of every call are checked too, before the package sees a wrong one.
"""

from typing import Any, Final

import pytest

from longspan.spec import hf
from longspan.spec.hf import fields


def config(**more: Any) -> dict[str, Any]:
    """Write a small Llama's config, some keys replaced."""
    return {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096} | more


def yarn(**more: Any) -> dict[str, Any]:
    """Write a rope mapping of type yarn."""
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024} | more


def llama(**more: Any) -> dict[str, Any]:
    """Write a config that has layers, some keys replaced or (None) absent."""
    keys = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 12}
    return {key: value for key, value in (keys | {"rope_theta": 1e4} | more).items() if value is not None}


def rope(**keys: Any) -> dict[str, Any]:
    """Write a config with this rope mapping."""
    return config(rope_scaling=keys)


ROTATIONS: Final[list[tuple[dict[str, Any], str]]] = [
    (rope(type="fourier", factor=2), "rope type must be one of .*longrope.* got 'fourier'"),
    (rope(type="linear", rope_type="yarn", factor=2), "rope_type and type must be the same"),
    (rope(type="linear"), "rope key 'factor', how many times longer the context becomes, must be given"),
    (rope(type="linear", factor="2"), "rope key 'factor' must be a finite number below 2.53, got '2'"),
    (rope(type="linear", factor=0), "factor must be a finite number above 0"),
    (rope(type="linear", factor=2, surprise=1), "key 'surprise' of rope type 'linear' must be one of"),
    (rope(type="default", beta_fast=32), "key 'beta_fast' of rope type 'default'"),
    (rope(type="yarn", factor=2), "'original_max_position_embeddings', the trained context length, must be given"),
    (rope(**yarn(extrapolation_factor=0.5)), "extrapolation_factor"),
    (rope(**yarn(llama_4_scaling_beta=0.1)), "a temperature that grows with the position is not supported"),
    (rope(**yarn(attention_factor=1.0, attn_factor=1.0)), "attn_factor"),
    (rope(type="default", use_fope=True), "FoPE"),
    (rope(type="default", xdrope_section=[1, 2]), "XD-RoPE"),
    (config(dual_chunk_attention_config={"chunk_size": 8}), "dual chunk attention"),
    (config(rotary_emb_scale_base=512), "xPos"),
    (rope(type="dynamic", factor=2, mixed_b=1), "mixed_b"),
    (rope(type="llama3", factor=8, original_max_position_embeddings=64), "low_freq_factor"),
    (rope(type="llama3", factor=8, original_max_position_embeddings=64.5), "a whole number"),
    (rope(type="longrope", original_max_position_embeddings=64, long_factor=[1.0] * 8), "short_factor.*a list of 8"),
    (
        rope(type="longrope", original_max_position_embeddings=64, short_factor=[1.0] * 8, long_factor=["a"] * 8),
        "long_factor' must be a finite number below 2.53, got 'a'",
    ),
    (rope(mrope_section=[1, 2, 3]), "mrope_section' must be numbers that add up to the 8 planes"),
    (rope(mrope_section=[4, 4], mrope_interleaved=True), "mrope_section' must be 3 numbers"),
    (rope(mrope_section="tall"), "mrope_section' must be a list"),
    (config(rope_scaling="linear"), "'rope_scaling' must be a mapping or null, got 'linear'"),
    (config(rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"type": "default"}), "two different"),
    (config(rope_parameters={"full_attention": {"rope_theta": 1.0}, "factor": 2}), "one mapping or one per layer kind"),
    (config(rope_scaling=yarn(), original_max_position_embeddings=512), "the same in the rope mapping and beside it"),
    (config(partial_rotary_factor=1.5), "partial_rotary_factor must be above 0 and at most 1"),
    (config(hidden_size=28), "must be even and at least 2, got 7"),
    (config(hidden_size=30), "a multiple of the 4 heads"),
    (config(hidden_size=None), "'hidden_size', the width that heads divide where there is no head_dim, must be given"),
    (config(num_attention_heads=0), "'num_attention_heads', the number of query heads, must be a whole number"),
    (config(rope_theta=True), "rope_theta must be a finite number"),
    (config(model_type="unheard_of"), "'rope_theta', the base of RoPE, must be given"),
    ({}, "must be given"),
    (config(model_type="ernie4_5_vl_moe", rope_theta=1e4, rope_scaling={"mrope_section": [4, 2, 2]}), "Ernie"),
]


@pytest.mark.parametrize(("keys", "message"), ROTATIONS)
def test_a_config_whose_rotation_has_no_meaning_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.rotations(keys, length=4096)


@pytest.mark.parametrize("length", [0, -1])
def test_a_context_of_no_tokens_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hf.rotations(config(), length=length)


@pytest.mark.parametrize("what", [[], "config.json", None, 3])
def test_what_is_no_mapping_is_refused(what: object) -> None:
    # Under test the shapes and types of every call are checked, so the check that users meet is called itself.
    with pytest.raises(ValueError, match=r"a mapping, the contents of a config\.json"):
        fields.language(what)


LAYERS: Final[list[tuple[dict[str, Any], str]]] = [
    (llama(num_hidden_layers=None), "'num_hidden_layers', the number of layers, must be given"),
    (llama(num_hidden_layers=0), "'num_hidden_layers', the number of layers, must be a whole number of at least 1"),
    (llama(num_attention_heads=None, head_dim=16), "'num_attention_heads', the number of query heads, must be given"),
    (llama(num_attention_heads=2.5), "whole number"),
    (llama(num_key_value_heads=3), "'num_key_value_heads' must be a divisor of the 4 query heads, got 3"),
    (llama(layer_types=["full_attention"]), "layer_types must be a list of 12 names"),
    (llama(layer_types=12 * ["strided"]), "a name in layer_types must be one of .* got 'strided'"),
    (llama(layer_types=12 * ["mamba"]), "layer_types must be with attention in some layer"),
    (llama(layer_types=12 * ["sliding_attention"]), "'sliding_window', the keys that a query of a sliding layer sees"),
    (llama(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers must be a list of 12 zeros and ones"),
    (llama(model_type="exaone4", sliding_window=8, sliding_window_pattern=""), "sliding_window_pattern"),
    (llama(attn_logit_softcapping="50"), "attn_logit_softcapping must be a finite number"),
    (llama(model_type=None), "model_type must be one of llama, .* got None"),
    (
        llama(rope_parameters={"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 2e4}}),
        "rope_parameters of 'full_attention' layers must be given",
    ),
]


@pytest.mark.parametrize(("keys", "message"), LAYERS)
def test_a_config_whose_layers_have_no_meaning_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.layers(keys)
