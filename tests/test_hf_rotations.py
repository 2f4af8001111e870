"""Published configurations become the rotations that their authors meant."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.spec import Rotation, hf, scaling

VECTORS: Final = json.loads((Path(__file__).parent / "vectors" / "rope.json").read_text("utf-8"))
ENTRIES: Final = {entry["model"]: entry for entry in VECTORS["entries"]}
TABLES: Final = [(model, name) for model, entry in ENTRIES.items() for name in entry["tables"]]

# Tables that depend on the length say at which they were made.
AT: Final = {
    "short": 4096,
    "long": 131_072,
    "seq_len=32768": 32_768,
    "seq_len=65536": 65_536,
    "seq_len=131072": 131_072,
}


def config(**more: Any) -> dict[str, Any]:
    """Write a small Llama's config, some keys replaced."""
    return {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096} | more


def rotation(keys: Mapping[str, Any], length: int = 4096) -> Rotation:
    """Read the one rotation of a model whose layers are alike."""
    made = hf.rotations(keys, length=length)
    assert list(made) == ["all"]
    return made["all"]


def same(one: Rotation, other: Rotation) -> bool:
    """Whether two rotations are equal, bit by bit."""
    return torch.equal(one.inv_freq, other.inv_freq) and (one.attention_factor, one.softmax_factor) == (
        other.attention_factor,
        other.softmax_factor,
    )


@pytest.mark.parametrize(("model", "name"), TABLES)
def test_a_published_config_gives_its_table(model: str, name: str) -> None:
    table = ENTRIES[model]["tables"][name]
    made = hf.rotations(ENTRIES[model]["config"], length=AT.get(name, 4096))
    read = made[name if name in made else "all"]
    expected = torch.tensor(table["inv_freq"], dtype=torch.float64)
    torch.testing.assert_close(read.inv_freq, expected, rtol=1e-12, atol=0)
    assert read.attention_factor == pytest.approx(table["attention_factor"], rel=1e-12)


def test_there_are_tables_of_every_method_that_is_published() -> None:
    assert len(TABLES) == 27
    assert [model for model, entry in ENTRIES.items() if not entry["tables"]] == [
        "EleutherAI/gpt-j-6b",
        "nomic-ai/nomic-embed-text-v1.5",
    ]


def test_gpt_j_turns_the_first_64_coordinates() -> None:
    # Its code has the base as a constant, so there is no table of it to read.
    assert same(rotation(ENTRIES["EleutherAI/gpt-j-6b"]["config"]), scaling.none(64, base=10_000))


def test_nomic_scales_only_where_its_file_says_by_how_much() -> None:
    # vLLM reads a dynamic NTK into the three lengths of the file alone; the authors' code asks for the factor.
    keys = ENTRIES["nomic-ai/nomic-embed-text-v1.5"]["config"]
    assert same(rotation(keys, 8192), scaling.none(64, base=1000))
    scaled = rotation(keys | {"rotary_scaling_factor": 2}, 8192)
    assert same(scaled, scaling.dynamic_ntk(64, base=1000, factor=2, original=2048, length=8192))


def test_deepseeks_mscale_enters_the_softmax_scale() -> None:
    # transformers left it out for DeepSeek-V2 until 2026; the authors' code has it.
    read = rotation(ENTRIES["deepseek-ai/DeepSeek-V2-Lite"]["config"])
    assert read.softmax_factor == pytest.approx((0.1 * 0.707 * math.log(40) + 1) ** 2, rel=1e-15)
    others = (hf.rotations(entry["config"], length=4096) for model, entry in ENTRIES.items() if "DeepSeek" not in model)
    assert {read.softmax_factor for made in others for read in made.values()} == {1.0}


def test_deepseeks_mscale_without_its_partner_is_used() -> None:
    # transformers takes the plain temperature, 1.3689, unless both are given; DeepSeek's code defaults the other to 0.
    keys = json.loads(json.dumps(ENTRIES["deepseek-ai/DeepSeek-V2-Lite"]["config"]))
    del keys["rope_scaling"]["mscale_all_dim"]
    read = rotation(keys)
    assert read.attention_factor == pytest.approx(0.1 * 0.707 * math.log(40) + 1, rel=1e-15)
    assert read.softmax_factor == 1


def yarn(**more: Any) -> dict[str, Any]:
    """Write a rope mapping of type yarn."""
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024} | more


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        # DeepSeek-R1-0528-Qwen3-8B: it multiplies the temperature (YaRN's own code); transformers ignores it.
        ({"attn_factor": 0.8782488562869419}, 1.0),
    ],
)
def test_yarns_attention_factor_has_one_precedence(keys: dict[str, float], expected: float) -> None:
    read = rotation(config(rope_theta=1e4, rope_scaling=yarn(**keys)))
    assert read.attention_factor == pytest.approx(expected, rel=1e-12)
    assert read.softmax_factor == 1


def test_yarns_explicit_factor_goes_before_the_ratio_of_lengths() -> None:
    said = rotation(config(max_position_embeddings=1024, rope_scaling=yarn()))
    assert same(said, scaling.yarn(16, factor=4, original=1024))
    silent = rotation(config(max_position_embeddings=8192, rope_scaling=yarn(factor=None)))
    assert same(silent, scaling.yarn(16, factor=8, original=1024))


def test_yarn_honours_truncate_in_a_mapping_per_layer_kind() -> None:
    # transformers 5.23 reads it from the outer mapping, where it is not, and truncates.
    rope = {"full_attention": yarn(truncate=False), "sliding_attention": {"rope_type": "default"}}
    made = hf.rotations(config(rope_theta=15e4, rope_parameters=rope), length=4096)
    assert same(made["full_attention"], scaling.yarn(16, base=15e4, factor=4, original=1024, truncate=False))
    assert not same(made["full_attention"], scaling.yarn(16, base=15e4, factor=4, original=1024))


@given(length=st.integers(1, 20_000))
def test_a_length_dependent_rotation_depends_on_the_length_alone(length: int) -> None:
    keys = config(rope_scaling={"type": "dynamic", "factor": 2.0})
    rotation(keys, 20_000)  # transformers keeps the frequencies of the longest sequence it has seen
    assert same(rotation(keys, length), scaling.dynamic_ntk(16, factor=2, original=4096, length=length))


@pytest.mark.parametrize("name", ["su", "longrope", "yarn"])
def test_phi3_has_had_three_names_for_longrope(name: str) -> None:
    rope = {"type": name, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    keys = config(model_type="phi3", rope_scaling=rope, original_max_position_embeddings=512)
    assert torch.equal(rotation(keys, 512).inv_freq, scaling.none(16).inv_freq)
    assert torch.equal(rotation(keys, 513).inv_freq, scaling.none(16).inv_freq / 4)
    assert rotation(keys).attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(512)), rel=1e-15)


def test_longropes_attention_factor_has_one_precedence() -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
    keys = config(original_max_position_embeddings=512)
    assert rotation(keys | {"rope_scaling": rope}).attention_factor == pytest.approx(
        math.sqrt(1 + math.log(4) / math.log(512)), rel=1e-15
    )
    assert rotation(keys | {"rope_scaling": rope | {"attention_factor": 1.25}}).attention_factor == 1.25
    # Phi-3.5-MoE: transformers 5.23 switches this factor, and never the frequencies.
    mixed = keys | {"rope_scaling": rope | {"short_mscale": 1.5, "long_mscale": 1.75}}
    assert [rotation(mixed, length).attention_factor for length in (512, 513)] == [1.5, 1.75]


def test_one_form_of_a_config_reads_as_the_other() -> None:
    old = config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = config(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    both = old | {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}
    nested = config(rope_parameters={"full_attention": new["rope_parameters"]})
    for keys in (old, new, both, nested):
        assert same(rotation(keys), scaling.linear(16, base=5e5, factor=2))


@pytest.mark.parametrize("nest", ["text_config", "thinker_config", "llm_config", "language_config"])
def test_a_multimodal_config_is_its_language_models(nest: str) -> None:
    assert same(rotation({"model_type": "llava", nest: config(rope_theta=5e5)}), scaling.none(16, base=5e5))


@pytest.mark.parametrize(
    ("keys", "d", "base"),
    [
        ({"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20_000}, 8, 2e4),
        ({"model_type": "gpt_neox"}, 4, 1e4),
        ({"partial_rotary_factor": 0.75, "head_dim": 32}, 24, 1e4),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}, "partial_rotary_factor": 1.0}, 4, 1e6),
        ({"rotary_dim": 8}, 8, 1e4),
        ({"model_type": "deepseek_v3", "qk_nope_head_dim": 128, "qk_rope_head_dim": 32, "kv_lora_rank": 8}, 32, 1e4),
        ({"model_type": "qwen3_next", "head_dim": 256}, 64, 1e4),
        ({"model_type": "unheard_of", "rope_theta": 7.0}, 16, 7.0),
    ],
)
def test_base_and_coordinates_have_many_names(keys: dict[str, Any], d: int, base: float) -> None:
    assert same(rotation(config(**keys)), scaling.none(d, base=base))


def test_gemma3_scales_its_full_attention_and_leaves_its_sliding_windows_alone() -> None:
    # As published: what is absent is in the authors' code.
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    keys = {"model_type": "gemma3", "text_config": text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}
    made = hf.rotations(keys, length=8192)
    assert same(made["full_attention"], scaling.linear(256, base=1e6, factor=8))
    assert same(made["sliding_attention"], scaling.none(256, base=1e4))


def test_olmo3_scales_its_full_attention_only() -> None:
    keys = config(model_type="olmo3", rope_theta=5e5, rope_scaling=yarn())
    made = hf.rotations(keys, length=4096)
    assert same(made["full_attention"], scaling.yarn(16, base=5e5, factor=4, original=1024))
    assert same(made["sliding_attention"], scaling.none(16, base=5e5))


def test_olmo3_with_a_base_alone_has_it_everywhere() -> None:
    # transformers 5.23 leaves its own default to the sliding layers of such a config.
    assert same(rotation(config(model_type="olmo3", rope_theta=1e4)), scaling.none(16, base=1e4))


def test_modernbert_has_a_base_for_each_kind() -> None:
    made = hf.rotations(config(model_type="modernbert", global_rope_theta=2e5), length=4096)
    assert same(made["full_attention"], scaling.none(16, base=2e5))
    assert same(made["sliding_attention"], scaling.none(16, base=1e4))


def test_what_the_authors_code_supplies_is_read_where_the_file_is_silent() -> None:
    silent = config(model_type="gpt_oss", head_dim=64)
    assert same(rotation(silent), rotation(ENTRIES["openai/gpt-oss-20b"]["config"]))
    assert same(rotation(silent | {"rope_parameters": {"rope_type": "default"}}), scaling.none(64, base=15e4))


def test_hunyuans_alpha_is_a_fixed_ntk() -> None:
    inert = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    keys = config(rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0, **inert})
    assert same(rotation(keys, 9000), scaling.ntk(16, factor=1000))


def test_mrope_in_chunks_gives_each_axis_its_planes() -> None:
    axis = rotation(ENTRIES["Qwen/Qwen2-VL-7B-Instruct (text)"]["config"]).axis
    assert axis is not None
    assert axis.tolist() == [0] * 16 + [1] * 24 + [2] * 24


def test_mrope_interleaved_gives_planes_by_turns_and_time_the_rest() -> None:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    axis = rotation(config(model_type="qwen3_vl_text", rope_theta=5e6, rope_scaling=rope)).axis
    assert axis is not None
    assert axis.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_keys_that_are_not_about_rotation_are_left_alone() -> None:
    keys = config(vocab_size=3, quantization_config={"bits": 4}, rope_scaling=yarn(finetuned=True))
    assert same(rotation(keys), rotation(config(rope_scaling=yarn())))


@pytest.mark.parametrize("model", ENTRIES)
def test_reading_changes_no_key(model: str) -> None:
    before = json.dumps(ENTRIES[model]["config"])
    hf.rotations(ENTRIES[model]["config"], length=9000)
    assert json.dumps(ENTRIES[model]["config"]) == before
