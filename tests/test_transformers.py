"""The reader and the rotations agree with Hugging Face's own code, run beside them.

transformers computes frequencies and angles in float32; the tolerances are the first-order rounding of
that arithmetic. Where it is known to differ from a model's authors, the difference itself is asserted.
"""

import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from longspan import spec
from longspan.spec import hf
from longspan.spec.hf.families import FAMILIES

transformers = pytest.importorskip("transformers", reason="compares with the rotations of transformers")
from transformers import masking_utils  # noqa: E402 - there may be none
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

VECTORS: Final = json.loads((Path(__file__).parent / "vectors" / "rope.json").read_text("utf-8"))["entries"]
CONFIGS: Final = {entry["model"]: entry["config"] for entry in VECTORS}
EPS: Final = 2.0**-24  # half a unit in the last place of float32

# Types that transformers does not have are Llama to it; parts of multimodal models live in the model's module.
ELSEWHERE: Final = {"internlm2": "llama", "minicpm": "llama", "kimi_k2": "deepseek_v3"}


def parsed(keys: dict[str, Any]) -> Any:
    """Make transformers' config object of a published mapping, as loading the file would."""
    model_type = str(keys["model_type"])
    keys = json.loads(json.dumps({key: value for key, value in keys.items() if key != "model_type"}))
    return CONFIG_MAPPING[ELSEWHERE.get(model_type) or model_type](**keys)


def tolerance(base: float, factor: float) -> float:
    """Relative error of a float32 frequency.

    An exponent rounded to float32 moves its power by ln(base) · EPS, and the power, its inverse and the
    blend cost a few more; near its slow end, a ramp's rounding is multiplied by the factor.
    """
    return (math.log(base) + 2 * factor + 8) * 2 * EPS


INITIALISED: Final = [
    (model, name, length)
    for model, name, length in [
        ("jondurbin/airoboros-33b-2.1", "linear", 4096),
        *[("internlm/internlm2_5-20b-chat", "dynamic", length) for length in (100, 32_768, 65_536, 131_072)],
        ("NousResearch/Yarn-Llama-2-7b-128k", "yarn", 4096),
        ("Qwen/Qwen2.5-7B-Instruct + documented yarn", "yarn", 4096),
        ("openai/gpt-oss-20b", "yarn", 4096),
        ("deepseek-ai/DeepSeek-V2-Lite", "yarn", 4096),
        ("meta-llama/Llama-3.1-8B", "llama3", 4096),
        ("meta-llama/Llama-4-Scout-17B-16E", "llama3", 4096),
        *[("microsoft/Phi-4-mini-instruct", "longrope", length) for length in (4096, 4097)],
        *[("openbmb/MiniCPM4-8B + documented 128k longrope", "longrope", length) for length in (32_768, 32_769)],
    ]
]


@pytest.mark.parametrize(("model", "name", "length"), INITIALISED)
def test_a_published_config_rotates_as_transformers_initialises_it(model: str, name: str, length: int) -> None:
    keys = CONFIGS[model]
    theirs, factor = ROPE_INIT_FUNCTIONS[name](parsed(keys), torch.device("cpu"), seq_len=length)
    ours = hf.rotations(keys, length=length)["all"]
    stretch = (keys.get("rope_scaling") or {}).get("factor") or 1.0
    rtol = tolerance(keys.get("rope_theta", 1e4), stretch)
    torch.testing.assert_close(theirs.double(), ours.inv_freq, rtol=rtol, atol=0)
    assert factor == pytest.approx(ours.attention_factor, rel=1e-12)


def test_proportional_rotates_as_transformers_initialises_it() -> None:
    keys = CONFIGS["google/gemma-4 (text, class default)"]
    theirs, _ = ROPE_INIT_FUNCTIONS["proportional"](
        parsed(keys), torch.device("cpu"), layer_type="full_attention", head_dim_key="head_dim"
    )
    ours = hf.rotations(keys, length=1)["full_attention"]
    torch.testing.assert_close(theirs.double(), ours.inv_freq, rtol=tolerance(1e6, 1), atol=0)


POSITION: Final = torch.tensor([0, 1, 2, 5, 17, 40, 63])
# An angle is off by its position times the error of a frequency and the rounding of their product; a product of two
# turned planes by two such angles, and by the rounding of two cosines, sines, products and sums each.
ROUNDING: Final = 2 * 63 * (tolerance(5e7, 32) + EPS) + 16 * EPS

SMALL: Final[dict[str, Any]] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 12, "head_dim": 16,
    "vocab_size": 300_000, "intermediate_size": 32, "max_position_embeddings": 131_072,
}  # fmt: skip
LATENT: Final[dict[str, Any]] = {
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 8,
}  # fmt: skip
WORDS: Final = {"rotary_dim": 8, "n_embd": 64, "n_head": 4, "n_layer": 12}
M_ROPE: Final = {"rope_scaling": {"type": "default", "mrope_section": [4, 2, 2]}, "rope_theta": 1e6}
TYPES: Final = [name for name in FAMILIES if name not in ELSEWHERE and name + "_text" not in FAMILIES]
"""Of the multimodal types that are listed under two names, the text's."""


def small(model_type: str) -> dict[str, Any]:
    """Write a small config of a model type."""
    keys = SMALL | {"model_type": model_type}
    if model_type in {"gptj", "codegen"}:
        keys = {"model_type": model_type, "n_positions": 64} | WORDS
    elif model_type.startswith("deepseek"):
        keys |= LATENT | {"num_key_value_heads": 4}
    elif "_vl" in model_type:
        rope = M_ROPE["rope_scaling"] | ({"mrope_interleaved": True} if "qwen3" in model_type else {})
        keys |= M_ROPE | {"rope_scaling": rope}
    if model_type == "phimoe":
        keys |= {"rope_theta": 1e4}
    return keys


def code(model_type: str) -> ModuleType:
    """Import the module that has a model type's rotation."""
    package = model_type.removesuffix("_text")
    return import_module(f"transformers.models.{package}.modeling_{package}")


def rotary_class(module: ModuleType) -> Any:
    """Find the class that makes a language model's cosines and sines."""
    names = [name for name in vars(module) if name.endswith("RotaryEmbedding") and "Vision" not in name]
    own = [name for name in names if getattr(module, name).__module__ == module.__name__]
    assert len(own) == 1, own
    return getattr(module, own[0])


def turned(
    model_type: str, keys: dict[str, Any], q: Tensor, k: Tensor, position: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, [1, h, m, d], by transformers' own code for a model type."""
    module = code(model_type)
    if model_type in {"gptj", "codegen"}:
        table = module.create_sinusoidal_positions(int(position.max()) + 1, q.shape[-1])[position]
        sin, cos = table.chunk(2, dim=-1)
        flat = [module.apply_rotary_pos_emb(x.movedim(1, 2), sin[None], cos[None]).movedim(2, 1) for x in (q, k)]
        return flat[0], flat[1]
    config = parsed(keys)
    config = getattr(config, "text_config", config)
    embedding, at = rotary_class(module)(config), position[None]
    if "mrope_section" in (keys.get("rope_scaling") or {}):
        at = torch.stack([position, position // 2, position // 3])[:, None]
    made = embedding(q, at, kind) if hasattr(embedding, f"{kind}_inv_freq") else embedding(q, at)
    if model_type == "deepseek_v2":
        return module.apply_rotary_emb(q, k, made)
    if model_type == "llama4_text":
        both = module.apply_rotary_emb(q.movedim(1, 2), k.movedim(1, 2), made)
        return both[0].movedim(2, 1), both[1].movedim(2, 1)
    cos, sin = made
    if model_type.startswith("deepseek"):
        return module.apply_rotary_pos_emb_interleave(q, k, cos, sin)
    if model_type == "gemma4_text":
        return module.apply_rotary_pos_emb(q, cos, sin), module.apply_rotary_pos_emb(k, cos, sin)
    return module.apply_rotary_pos_emb(q, k, cos, sin)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Every query's product with every key; the same whichever way a code orders the coordinates it returns."""
    return torch.einsum("bhmd,bhnd->bhmn", q.double(), k.double())


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.filterwarnings("ignore")  # what transformers says about a small config is not the subject
def test_every_model_type_pairs_and_turns_coordinates_as_its_code_does(model_type: str) -> None:
    keys = small(model_type)
    layers, rotations = hf.layers(keys), hf.rotations(keys, length=64)
    position = POSITION
    for name, layer in layers.items():
        if layer.rotation is None:
            continue
        ours = rotations[layer.rotation]
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, 2, len(position), layer.rotary_dim, generator=generator) for _ in range(2))
        at = position
        if ours.axis is not None:
            at = torch.stack([position, position // 2, position // 3])[:, None]
        expected = scores(*spec.rotate_qk(q.double(), k.double(), at, ours, pairing=layer.pairing))
        kind = name if layer.rotation == "all" else layer.rotation
        got = scores(*turned(model_type, keys, q, k, position, kind))
        norms = scores(q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True))
        assert ((got - expected).abs() <= ROUNDING * norms).all(), (model_type, name)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_wrong_pairing_would_be_seen(model_type: str) -> None:
    keys = small(model_type)
    layer = next(layer for layer in hf.layers(keys).values() if layer.rotation is not None)
    ours = hf.rotations(keys, length=64)[layer.rotation or ""]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, len(POSITION), layer.rotary_dim, dtype=torch.float64, generator=generator)
    half, interleaved = (
        scores(*2 * (spec.rotate(x, POSITION, replace(ours, axis=None), pairing=p),)) for p in ("half", "interleaved")
    )
    # Fifty times what the comparison above lets pass.
    assert (half - interleaved).abs().max() > 50 * ROUNDING * x.square().sum(-1).max()


WINDOWED: Final = [
    pytest.param(name, more, id=f"{name} {json.dumps(more)}")
    for name in TYPES
    for more in (
        {},
        {"sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 5},
        {"sliding_window": None},
    )
    if name not in {"gptj", "codegen"}
    # No published file says these, and transformers builds no mask, or no config, of them.
    and not (more == {"sliding_window": None} and FAMILIES[name].pattern in {"every", "local"})
    and not ("use_sliding_window" in more and FAMILIES[name].pattern in {"unsaid", "local"})
]


@pytest.mark.parametrize(("model_type", "more"), WINDOWED)
@pytest.mark.filterwarnings("ignore")
def test_layers_slide_where_those_of_transformers_do(model_type: str, more: dict[str, Any]) -> None:
    keys = small(model_type) | more
    theirs = parsed(keys)
    window = getattr(theirs, "sliding_window", None)
    uniform = "sliding_attention" if FAMILIES[model_type].pattern == "sliding" and window else "full_attention"
    kinds = [kind for kind in getattr(theirs, "layer_types", None) or 12 * [uniform] if kind != "linear_attention"]
    ours = hf.layers(keys)
    sliding = sum(layer.count for layer in ours.values() if layer.window is not None)
    chunked = sum(layer.count for layer in ours.values() if layer.chunk is not None)
    assert sliding == kinds.count("sliding_attention")
    assert chunked == kinds.count("chunked_attention")
    assert sum(layer.count for layer in ours.values()) == len(kinds)
    if FAMILIES[model_type].causal:
        assert {layer.window for layer in ours.values()} - {None} <= {window}


def test_a_window_is_counted_as_in_transformers_masks() -> None:
    i = torch.arange(20)
    q, k = i[:, None], i[None, :]
    mistral = hf.layers(SMALL | {"model_type": "mistral", "sliding_window": 5})["all"]
    bert = hf.layers(SMALL | {"model_type": "modernbert", "local_attention": 10})["sliding_attention"]
    llama = hf.layers(SMALL | {"model_type": "llama4_text", "attention_chunk_size": 6})["chunked_attention"]
    half = parsed(SMALL | {"model_type": "modernbert", "local_attention": 10}).sliding_window
    no_padding = torch.zeros(1, dtype=torch.int64)
    for layer, theirs in (
        (mistral, masking_utils.sliding_window_causal_mask_function(5)),
        (bert, masking_utils.sliding_window_bidirectional_mask_function(half)),
        (llama, masking_utils.chunked_causal_mask_function(6, no_padding)),
    ):
        ours = spec.visible(spec.bounds(hf.mask(layer), 1, 20, 20), 20)[0]
        assert torch.equal(ours, theirs(0, 0, q, k))


def test_transformers_dynamic_ntk_depends_on_what_it_saw_before_and_ours_does_not() -> None:
    keys = SMALL | {
        "model_type": "llama",
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    embedding = rotary_class(code("llama"))(parsed(keys))
    x = torch.zeros(1)
    for last in (4095, 2999):
        embedding(x, torch.tensor([[last]]))
    stale = embedding.inv_freq.double()
    now, then = (hf.rotations(keys, length=length)["all"].inv_freq for length in (3000, 4096))
    torch.testing.assert_close(stale, then, rtol=tolerance(1e4, 2), atol=0)
    assert ((stale - now).abs() / now).max() > 0.1


def test_transformers_switches_longrope_for_a_whole_batch_and_ours_row_by_row() -> None:
    keys = SMALL | {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    embedding = rotary_class(code("llama"))(parsed(keys))
    rows = torch.stack([torch.arange(50), torch.arange(50) + 50])
    cos, _ = embedding(torch.zeros(1), rows)
    ours = spec.scaling.longrope(
        16, short_factor=[1.0] * 8, long_factor=[4.0] * 8, original=64, length=rows[:, -1] + 1, factor=131_072 / 64
    )
    mine = spec.angle(rows, ours).cos() * ours.attention_factor
    torch.testing.assert_close(cos[1, :, :8].double(), mine[1], rtol=0, atol=1e-4)
    assert (cos[0, :, :8].double() - mine[0]).abs().max() > 0.1


def test_transformers_ignores_deepseeks_mscale_without_its_partner() -> None:
    keys = json.loads(json.dumps(CONFIGS["deepseek-ai/DeepSeek-V2-Lite"]))
    del keys["rope_scaling"]["mscale_all_dim"]
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](parsed(keys), torch.device("cpu"))
    assert factor == pytest.approx(0.1 * math.log(40) + 1)
    assert hf.rotations(keys, length=1)["all"].attention_factor == pytest.approx(0.1 * 0.707 * math.log(40) + 1)
