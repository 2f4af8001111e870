"""Published configurations become the layers that attention needs."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from longspan import spec
from longspan.spec import hf
from longspan.spec.hf.families import FAMILIES

HERE: Final = Path(__file__).parent
ENTRIES: Final = {
    entry["model"]: entry["config"]
    for entry in json.loads((HERE / "vectors" / "rope.json").read_text("utf-8"))["entries"]
}
EXAMPLES: Final = HERE.parent / "examples" / "configs"

# The installed wheel is tested in a directory that holds the tests alone.
from_sources = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the sources")


def config(**more: Any) -> dict[str, Any]:
    """Write a small Llama's config, some keys replaced or (None) absent."""
    keys = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 12}
    return {key: value for key, value in (keys | {"rope_theta": 1e4} | more).items() if value is not None}


def counts(keys: Mapping[str, Any]) -> dict[str, int]:
    """How many layers there are of each kind."""
    return {kind: layer.count for kind, layer in hf.layers(keys).items()}


def sees(layer: hf.Layer, n: int) -> torch.Tensor:
    """Which keys every query of n tokens sees, [n, n]."""
    return spec.visible(spec.bounds(hf.mask(layer), 1, n, n), n)[0]


def example(name: str) -> dict[str, hf.Layer]:
    """Read the layers of a shipped config."""
    return hf.layers(json.loads((EXAMPLES / f"{name}.json").read_text("utf-8")))


def numbers(layer: hf.Layer) -> tuple[Any, ...]:
    """Sizes of a layer: count, heads, groups, head_dim, value_dim, rotary_dim, cached_dim."""
    return (layer.count, layer.heads, layer.groups, layer.head_dim, layer.value_dim, layer.rotary_dim, layer.cached_dim)


@from_sources
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.json")), ids=lambda file: file.stem)
def test_a_shipped_config_says_where_it_is_from_and_can_be_read(file: Path) -> None:
    keys = json.loads(file.read_text("utf-8"))
    assert set(keys["_source"]) == {"model", "url", "revision"}
    assert all(keys["_source"].values())
    layers, rotations = hf.layers(keys), hf.rotations(keys, length=131_072)
    assert sum(layer.count for layer in layers.values()) == keys["num_hidden_layers"]
    for layer in layers.values():
        assert layer.rotation is not None
        assert 2 * rotations[layer.rotation].inv_freq.shape[-1] == layer.rotary_dim
        assert layer.omits == ()


@from_sources
def test_there_are_four_shipped_configs() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.json")} == {
        "gpt-oss-20b", "llama-3.1-8b", "phi-3-mini-128k-instruct", "qwen2.5-7b-instruct-yarn",
    }  # fmt: skip


@from_sources
def test_llama_is_one_kind_of_layer() -> None:
    (layer,) = example("llama-3.1-8b").values()
    assert numbers(layer) == (32, 32, 8, 128, 128, 128, 2048)
    assert (layer.rotation, layer.window, layer.chunk, layer.softcap) == ("all", None, None, None)
    assert (layer.causal, layer.sinks, layer.pairing) == (True, False, "half")
    assert layer.scale == pytest.approx(1 / math.sqrt(128), rel=1e-15)
    assert torch.equal(sees(layer, 9), torch.ones(9, 9).tril().bool())


@from_sources
def test_gpt_oss_alternates_a_window_of_128_with_full_attention_and_has_sinks() -> None:
    layers = example("gpt-oss-20b")
    sliding, full = layers["sliding_attention"], layers["full_attention"]
    assert numbers(sliding) == numbers(full) == (12, 64, 8, 64, 64, 64, 1024)
    assert (sliding.window, full.window) == (128, None)
    assert (sliding.sinks, full.sinks) == (True, True)
    assert (sliding.rotation, full.rotation) == ("all", "all")
    assert sees(sliding, 300).sum(-1).tolist() == [min(i + 1, 128) for i in range(300)]


@from_sources
def test_qwens_window_is_off_and_phis_is_wider_than_its_context() -> None:
    assert numbers(example("qwen2.5-7b-instruct-yarn")["all"]) == (28, 28, 4, 128, 128, 128, 1024)
    assert example("qwen2.5-7b-instruct-yarn")["all"].window is None
    assert numbers(example("phi-3-mini-128k-instruct")["all"]) == (32, 32, 32, 96, 96, 96, 6144)
    assert example("phi-3-mini-128k-instruct")["all"].window == 262_144


def test_mistrals_window_is_on_every_layer_unless_the_file_says_null() -> None:
    first = hf.layers(ENTRIES["mistralai/Mistral-7B-v0.1"] | {"num_hidden_layers": 32})["all"]
    assert (first.count, first.window) == (32, 4096)
    later = hf.layers(ENTRIES["mistralai/Mistral-7B-v0.1"] | {"num_hidden_layers": 32, "sliding_window": None})["all"]
    assert later.window is None


def test_qwens_upper_layers_slide_if_it_says_so() -> None:
    keys = config(model_type="qwen2", sliding_window=8, max_window_layers=9)
    assert counts(keys) == {"all": 12}
    assert hf.layers(keys)["all"].window is None
    on = keys | {"use_sliding_window": True}
    assert counts(on) == {"full_attention": 9, "sliding_attention": 3}
    assert counts(on | {"model_type": "qwen3_moe"}) == {"all": 12}  # its code slides everywhere
    assert hf.layers(on | {"model_type": "qwen3_moe"})["all"].window == 8
    with pytest.raises(ValueError, match="'layer_types' must be given where a model of this type uses a sliding"):
        hf.layers(on | {"model_type": "qwen2_moe"})  # whose codes disagree on the layers
    assert hf.layers(keys | {"use_sliding_window": True, "max_window_layers": 0})["all"].window == 8


def test_gemma2_alternates_and_caps_its_scores() -> None:
    layers = hf.layers(config(model_type="gemma2", query_pre_attn_scalar=144, sliding_window=32))
    assert {kind: (layer.count, layer.window) for kind, layer in layers.items()} == {
        "sliding_attention": (6, 32),
        "full_attention": (6, None),
    }
    for layer in layers.values():
        assert (layer.softcap, layer.scale, layer.head_dim) == (50.0, 1 / 12, 256)


def test_gemma3_has_one_far_sighted_layer_in_six_with_a_rotation_of_its_own() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    layers = hf.layers({"model_type": "gemma3", "text_config": text})
    assert {kind: (layer.count, layer.window, layer.rotation) for kind, layer in layers.items()} == {
        "sliding_attention": (29, 1024, "sliding_attention"),
        "full_attention": (5, None, "full_attention"),
    }
    assert layers["full_attention"].softcap is None


def test_gemma4s_full_attention_has_wider_heads_and_ends_the_model() -> None:
    keys = config(model_type="gemma4_text", num_key_value_heads=2, num_hidden_layers=8, rope_theta=None)
    layers = hf.layers(keys)
    assert numbers(layers["sliding_attention"]) == (6, 4, 2, 256, 256, 256, 1024)
    assert numbers(layers["full_attention"]) == (2, 4, 2, 512, 512, 512, 2048)
    assert layers["full_attention"].scale == 1
    fewer = hf.layers(keys | {"attention_k_eq_v": True, "num_global_key_value_heads": 1})
    assert (fewer["full_attention"].groups, fewer["sliding_attention"].groups) == (1, 2)
    assert hf.layers(keys | {"num_kv_shared_layers": 2})["full_attention"].omits == ("num_kv_shared_layers",)


def test_gemma_can_look_both_ways() -> None:
    keys = config(model_type="gemma3_text", use_bidirectional_attention=True, sliding_window=8)
    near = hf.layers(keys)["sliding_attention"]
    i = torch.arange(20)
    assert torch.equal(sees(near, 20), (i[:, None] - i).abs() <= 8 // 2 + 1)
    assert sees(hf.layers(keys)["full_attention"], 5).all()


def test_llama4_rotates_in_chunks_and_not_where_it_sees_everything() -> None:
    keys = ENTRIES["meta-llama/Llama-4-Scout-17B-16E"] | {"num_hidden_layers": 48, "attention_chunk_size": 4}
    layers = hf.layers(keys)
    near, far = layers["chunked_attention"], layers["full_attention"]
    assert (near.count, near.rotation, near.rotary_dim, near.chunk, near.pairing) == (36, "all", 128, 4, "interleaved")
    assert (far.count, far.rotation, far.rotary_dim, far.chunk) == (12, None, 0, None)
    assert (near.omits, far.omits) == ((), ("attn_temperature_tuning",))
    i = torch.arange(11)
    assert torch.equal(sees(near, 11), (i[:, None] // 4 == i // 4) & (i <= i[:, None]))


def test_smollm3_does_not_rotate_every_fourth_layer() -> None:
    layers = hf.layers(config(model_type="smollm3"))
    assert {kind: (layer.count, layer.rotation) for kind, layer in layers.items()} == {
        "full_attention": (9, "all"),
        "full_attention_nope": (3, None),
    }
    near = hf.layers(config(model_type="smollm3", use_sliding_window=True, sliding_window=8))
    assert {kind: (layer.window, layer.rotation) for kind, layer in near.items()} == {
        "full_attention": (None, "all"),
        "sliding_attention": (8, None),
    }
    listed = hf.layers(config(model_type="smollm3", no_rope_layers=[0] + 11 * [1]))
    assert (listed["full_attention"].count, listed["full_attention_nope"].count) == (11, 1)


@pytest.mark.parametrize("model_type", ["cohere2", "exaone4"])
def test_some_do_not_rotate_where_they_see_everything(model_type: str) -> None:
    layers = hf.layers(config(model_type=model_type, sliding_window=8))
    assert {kind: (layer.count, layer.window, layer.rotation) for kind, layer in layers.items()} == {
        "sliding_attention": (9, 8, "all"),
        "full_attention": (3, None, None),
    }


def test_exaones_pattern_can_be_letters() -> None:
    keys = config(model_type="exaone4", sliding_window=8, sliding_window_pattern="LLG", num_hidden_layers=8)
    assert counts(keys) == {"sliding_attention": 5, "full_attention": 3}
    assert hf.layers(keys | {"sliding_window": None})["all"].rotation == "all"


def test_modernberts_windows_are_two_sided() -> None:
    layers = hf.layers(config(model_type="modernbert", local_attention=6))
    assert {kind: layer.count for kind, layer in layers.items()} == {"full_attention": 4, "sliding_attention": 8}
    i = torch.arange(12)
    assert torch.equal(sees(layers["sliding_attention"], 12), (i[:, None] - i).abs() <= 3)
    assert sees(layers["full_attention"], 7).all()


def test_latent_attention_caches_its_latent() -> None:
    layer = hf.layers(ENTRIES["deepseek-ai/DeepSeek-V2-Lite"] | {"num_hidden_layers": 27})["all"]
    assert numbers(layer) == (27, 16, 16, 192, 128, 64, 576)
    assert layer.scale == pytest.approx(1 / math.sqrt(192), rel=1e-15)
    sparse = ENTRIES["deepseek-ai/DeepSeek-V2-Lite"] | {"num_hidden_layers": 27, "index_topk": 2048}
    assert hf.layers(sparse)["all"].omits == ("index_topk",)


def test_layers_without_keys_are_left_out() -> None:
    assert counts(config(model_type="qwen3_next")) == {"all": 3}
    assert counts(config(model_type="qwen3_next", full_attention_interval=6)) == {"all": 2}
    types = 3 * ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    layer = hf.layers(config(model_type="qwen3_next", layer_types=types, head_dim=256))["all"]
    assert (layer.count, layer.rotary_dim) == (3, 64)


def test_granite_has_a_scale_of_its_own() -> None:
    assert hf.layers(config(model_type="granite", attention_multiplier=0.0078125))["all"].scale == 0.0078125


def test_nomics_files_say_their_pairing() -> None:
    keys = {"model_type": "nomic_bert", "n_embd": 768, "n_head": 12, "n_layer": 12}
    assert hf.layers(keys)["all"].pairing == "half"
    assert hf.layers(keys | {"rotary_emb_interleaved": True})["all"].pairing == "interleaved"
    assert sees(hf.layers(keys)["all"], 5).all()


def test_layer_types_go_before_the_rule_of_the_model_type() -> None:
    types = 10 * ["full_attention"] + 2 * ["sliding_attention"]
    assert counts(config(model_type="gpt_oss", layer_types=types)) == {"full_attention": 10, "sliding_attention": 2}


def test_an_unknown_model_type_is_read_once_its_pairing_is_said() -> None:
    keys = config(model_type="unheard_of")
    with pytest.raises(ValueError, match="pairing='half' or 'interleaved' is passed, got 'unheard_of'"):
        hf.layers(keys)
    assert hf.layers(keys, pairing="interleaved")["all"].pairing == "interleaved"
    with pytest.raises(ValueError, match="'layer_types' must be given for an unknown model type with a sliding_window"):
        hf.layers(keys | {"sliding_window": 8}, pairing="half")
    with pytest.raises(ValueError, match="pairing of model type 'llama' must be half, got interleaved"):
        hf.layers(config(), pairing="interleaved")


@pytest.mark.parametrize("model", [model for model in ENTRIES if "gemma-4" not in model])
def test_every_published_config_has_layers_that_fit_its_rotations(model: str) -> None:
    keys = {"num_hidden_layers": 12} | ENTRIES[model]
    rotations = hf.rotations(keys, length=4096)
    for layer in hf.layers(keys).values():
        planes = 0 if layer.rotation is None else rotations[layer.rotation].inv_freq.shape[-1]
        assert layer.rotary_dim == 2 * planes <= layer.head_dim


def test_every_model_type_has_layers() -> None:
    head = {"head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 4, "v_head_dim": 8}
    for model_type, family in FAMILIES.items():
        latent = model_type.startswith(("deepseek", "kimi"))
        keys = config(model_type=model_type, **(head if latent else {}))
        layers = hf.layers(keys)
        assert sum(layer.count for layer in layers.values()) == (3 if family.pattern == "linear" else 12)
        assert {layer.pairing for layer in layers.values()} == {family.pairing}
        assert {layer.rotation for layer in layers.values()} - {None} <= set(hf.rotations(keys, length=64))


def test_every_fact_of_a_layer_is_documented() -> None:
    assert hf.Layer.__doc__ is not None
    assert [field.name for field in fields(hf.Layer) if f"        {field.name}: " not in hf.Layer.__doc__] == []
