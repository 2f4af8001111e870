"""What a published configuration leaves unsaid, known per model type.

A config does not say which coordinates form a plane, which layers slide, or what its authors' code
supplies for an absent key. Pairings are those of the Hugging Face checkpoints, whose
rows some conversions permuted: Llama is interleaved in Meta's files and half-split here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from ..pairing import Pairing

Pattern = Literal["full", "sliding", "every", "upper", "local", "chunked", "still", "linear", "unsaid"]
"""Which layers see less than everything: none; all, where a window is given; all but every n-th
(`sliding_window_pattern`); those from `max_window_layers` on, if `use_sliding_window`; all but each
n-th from the first (`global_attn_every_n_layers`); those that rotate (Llama 4); those that do not (SmolLM3);
none, and those but each n-th
(`full_attention_interval`) have no softmax at all; or codes disagree, and the config has to say."""


@dataclass(frozen=True)
class Family:
    """Facts about a model type that its configurations do not carry.

    Attributes:
        pairing: Which coordinates form a plane.
        pattern: Which layers see less than everything, where `layer_types` does not say.
        nope: Layers without rotation: none, those of full attention beside sliding ones, or the zeros of
            `no_rope_layers`.
        causal: Whether a query sees no key after it.
        sinks: Whether every head has a learned sink logit.
        local_unscaled: Whether `rope_scaling` leaves the sliding layers alone (Olmo 3).
        scale: Softmax scale, where it is not 1 / √head_dim.
        defaults: What the authors' code takes for an absent key.
    """

    pairing: Pairing
    pattern: Pattern = "full"
    nope: Literal["none", "full", "listed"] = "none"
    causal: bool = True
    sinks: bool = False
    local_unscaled: bool = False
    scale: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def family(pairing: Pairing = "half", **facts: Any) -> Family:  # noqa: ANN401 - the fields of Family, or defaults
    """State a family; facts that are no field of `Family` are defaults of its config."""
    fields = {name: facts[name] for name in Family.__dataclass_fields__ if name in facts}
    defaults = {"rope_theta": 10_000.0} | {name: value for name, value in facts.items() if name not in fields}
    return Family(pairing, **fields, defaults=MappingProxyType(defaults))


LLAMA: Final = family()
SLIDING: Final = family(pattern="sliding")
QWEN: Final = family(pattern="upper", use_sliding_window=False, sliding_window=4096, max_window_layers=28)
QWEN_NEXT: Final = family(pattern="linear", full_attention_interval=4, partial_rotary_factor=0.25)
GEMMA3: Final = family(
    pattern="every", sliding_window_pattern=6, sliding_window=4096, rope_theta=1e6, rope_local_base_freq=1e4,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
)  # fmt: skip
GEMMA4: Final = family(
    pattern="every", sliding_window_pattern=6, sliding_window=512, scale=1.0, head_dim=256, global_head_dim=512,
    rope_parameters=MappingProxyType({
        "sliding_attention": MappingProxyType({"rope_type": "default", "rope_theta": 1e4}),
        "full_attention": MappingProxyType(
            {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
        ),
    }),
)  # fmt: skip
APERTUS: Final = family(
    rope_theta=12e6,
    rope_parameters=MappingProxyType({
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }),
)  # fmt: skip
GPT_OSS_ROPE: Final = MappingProxyType({
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
})  # fmt: skip
DEEPSEEK: Final = family("interleaved")
LLAMA4: Final = family(
    "interleaved", pattern="chunked", nope="listed", rope_theta=5e5, no_rope_layer_interval=4,
    attention_chunk_size=8192, head_dim=128, attn_temperature_tuning=True,
)  # fmt: skip

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({
    "llama": LLAMA, "internlm2": LLAMA, "minicpm": LLAMA, "granite": LLAMA, "granitemoe": LLAMA, "olmo": LLAMA,
    "olmo2": LLAMA, "olmoe": LLAMA, "seed_oss": LLAMA, "arcee": LLAMA, "gemma": family(head_dim=256),
    "apertus": APERTUS, "minimax_m2": family(rope_theta=5e6),
    "mistral": family(pattern="sliding", sliding_window=4096), "mixtral": family(pattern="sliding", rope_theta=1e6),
    "starcoder2": SLIDING, "phi3": SLIDING, "phimoe": family(pattern="sliding", rope_theta=1e6),
    "qwen2": QWEN, "qwen2_moe": family(pattern="unsaid"), "qwen3": QWEN,
    "qwen3_moe": family(pattern="sliding", use_sliding_window=False, sliding_window=4096),
    "qwen2_vl": QWEN, "qwen2_vl_text": QWEN, "qwen2_5_vl": QWEN, "qwen2_5_vl_text": QWEN,
    "qwen3_vl": LLAMA, "qwen3_vl_text": LLAMA, "qwen3_vl_moe": LLAMA, "qwen3_vl_moe_text": LLAMA,
    "qwen3_next": QWEN_NEXT, "qwen3_5_text": QWEN_NEXT, "qwen3_5_moe_text": QWEN_NEXT,
    "gemma2": family(pattern="every", sliding_window_pattern=2, sliding_window=4096, head_dim=256,
                     query_pre_attn_scalar=256, attn_logit_softcapping=50.0),
    "gemma3": GEMMA3, "gemma3_text": GEMMA3, "gemma4": GEMMA4, "gemma4_text": GEMMA4,
    "gpt_oss": family(pattern="every", sinks=True, sliding_window_pattern=2, sliding_window=128, head_dim=64,
                      rope_theta=150_000.0, rope_parameters=GPT_OSS_ROPE),
    "olmo3": family(pattern="every", sliding_window_pattern=4, sliding_window=4096, local_unscaled=True,
                    rope_theta=5e5),
    "smollm3": family(pattern="still", nope="listed", no_rope_layer_interval=4, rope_theta=2e6,
                      use_sliding_window=False),
    "exaone4": family(pattern="every", nope="full", sliding_window_pattern=4, sliding_window=4096),
    "gpt_neox": family(rotary_pct=0.25), "phi": family(partial_rotary_factor=0.5),
    "stablelm": family(partial_rotary_factor=0.25), "persimmon": family(partial_rotary_factor=0.5),
    "nemotron": family(partial_rotary_factor=0.5), "glm4_moe": family(partial_rotary_factor=0.5),
    "modernbert": family(pattern="local", causal=False, global_attn_every_n_layers=3, local_attention=128,
                         global_rope_theta=160_000.0, local_rope_theta=1e4),
    "nomic_bert": family(causal=False, rope_theta=1_000.0),
    "gptj": family("interleaved"), "codegen": family("interleaved"),
    "cohere": family("interleaved", rope_theta=5e5),
    "cohere2": family("interleaved", pattern="every", nope="full", sliding_window_pattern=4, sliding_window=4096),
    "glm": family("interleaved", partial_rotary_factor=0.5), "glm4": family("interleaved", partial_rotary_factor=0.5),
    "helium": family("interleaved", rope_theta=1e5),
    "ernie4_5": family("interleaved", rope_theta=5e5), "ernie4_5_moe": family("interleaved", rope_theta=5e5),
    "llama4": LLAMA4, "llama4_text": LLAMA4,
    "deepseek_v2": DEEPSEEK, "deepseek_v3": DEEPSEEK, "deepseek_v32": DEEPSEEK, "kimi_k2": DEEPSEEK,
})  # fmt: skip
