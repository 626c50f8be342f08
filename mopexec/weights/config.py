"""A ModelSpec as a Hugging Face config.json: tables of its keys by architecture. What comes out is read back
and must be the same network, so that nothing is said that the architecture does not mean.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mopexec.weights.begin import differences
from mopsim.common.errors import MopError, shown
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import ModelSpec

Config = dict[str, Any]
Value = str | int | bool | None | Callable[[ModelSpec], Any]
"""What a key is: a field of ModelSpec by its name after '.', a function of the spec, or the value itself."""


def _shared(model: ModelSpec) -> int:
    return model.shared_expert_intermediate_size // model.moe_intermediate_size


def _window(model: ModelSpec) -> int | None:
    return model.sliding_window or None


def _biased(model: ModelSpec) -> bool:
    return model.attention_bias != "none"


def _kinds(model: ModelSpec) -> list[str]:
    return list(model.layer_words)


def _dense(model: ModelSpec) -> list[int]:
    return [layer for layer in range(model.num_hidden_layers) if not model.is_moe_layer(layer)]


def _routed(model: ModelSpec) -> list[int]:
    return list(model.moe_layers)


_COMMON: dict[str, Value] = {
    "hidden_act": "silu",
    **{
        name: f".{name}"
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "rms_norm_eps", "rope_theta", "tie_word_embeddings",
        )
    },
}  # fmt: skip
_CHOICE: dict[str, Value] = {
    "num_experts_per_tok": ".num_experts_per_tok",
    "norm_topk_prob": ".norm_topk_prob",
}
_WINDOWED: dict[str, Value] = {
    "use_sliding_window": lambda m: m.sliding_window > 0,
    "sliding_window": _window,
}
_QWEN: dict[str, Value] = (
    _CHOICE
    | _WINDOWED
    | {
        "head_dim": ".head_dim",
        "num_experts": ".num_local_experts",
        "moe_intermediate_size": ".moe_intermediate_size",
        "intermediate_size": lambda m: m.intermediate_size or m.moe_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense,
    }
)
_EXPERTS: dict[str, Value] = _CHOICE | {
    name: f".{name}"
    for name in (
        "intermediate_size", "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor",
        "n_group", "topk_group",
    )
} | {"n_routed_experts": ".num_local_experts", "n_shared_experts": _shared}  # fmt: skip
"""Those of DeepSeek's layout."""
_DEEPSEEK: dict[str, Value] = _EXPERTS | {
    name: f".{name}"
    for name in (
        "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "topk_method", "scoring_func",
    )
} | {
    "q_lora_rank": lambda m: m.q_lora_rank or None,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "rope_interleave": ".rope_interleave",
}  # fmt: skip

KEYS: dict[str, Mapping[str, Value]] = {
    "LlamaForCausalLM": {
        "model_type": "llama", "intermediate_size": ".intermediate_size", "head_dim": ".head_dim",
        "attention_bias": _biased, "mlp_bias": ".ffn_bias",
    },
    "Qwen3ForCausalLM": {
        "model_type": "qwen3", "intermediate_size": ".intermediate_size", "head_dim": ".head_dim",
        "attention_bias": _biased, "layer_types": _kinds, **_WINDOWED,
    },
    "MixtralForCausalLM": {
        "model_type": "mixtral", "num_experts_per_tok": ".num_experts_per_tok",
        "num_local_experts": ".num_local_experts", "intermediate_size": ".moe_intermediate_size",
        "head_dim": ".head_dim", "sliding_window": _window,
    },
    "Qwen3MoeForCausalLM": _QWEN | {"model_type": "qwen3_moe", "attention_bias": _biased},
    "Qwen2MoeForCausalLM": _QWEN | {
        "model_type": "qwen2_moe", "qkv_bias": _biased, "layer_types": _kinds,
        "shared_expert_intermediate_size": ".shared_expert_intermediate_size",
    },
    "OlmoeForCausalLM": _CHOICE | {
        "model_type": "olmoe", "num_experts": ".num_local_experts",
        "intermediate_size": ".moe_intermediate_size", "attention_bias": _biased, "clip_qkv": None,
    },
    "GptOssForCausalLM": {
        "model_type": "gpt_oss", "num_experts_per_tok": ".num_experts_per_tok", "head_dim": ".head_dim",
        "num_local_experts": ".num_local_experts", "intermediate_size": ".moe_intermediate_size",
        "sliding_window": ".sliding_window", "layer_types": _kinds, "attention_bias": _biased,
        "swiglu_limit": ".swiglu_limit", "swiglu_alpha": ".swiglu_alpha",
    },
    "DeepseekV3ForCausalLM": _DEEPSEEK | {
        "model_type": "deepseek_v3", "num_nextn_predict_layers": ".num_nextn_predict_layers",
    },
    "DeepseekV2ForCausalLM": _DEEPSEEK | {"model_type": "deepseek_v2"},
    "Glm4MoeForCausalLM": _EXPERTS | {
        "model_type": "glm4_moe", "head_dim": ".head_dim", "attention_bias": _biased,
        "use_qk_norm": lambda m: m.qk_norm == "head", "partial_rotary_factor": ".partial_rotary_factor",
        "scoring_func": ".scoring_func", "num_nextn_predict_layers": ".num_nextn_predict_layers",
    },
    "Dots1ForCausalLM": _EXPERTS | {
        "model_type": "dots1", "head_dim": ".head_dim", "attention_bias": _biased, "layer_types": _kinds,
        "sliding_window": _window,
    },
    "Llama4ForCausalLM": {
        "model_type": "llama4_text", "head_dim": ".head_dim", "intermediate_size_mlp": ".intermediate_size",
        "intermediate_size": ".moe_intermediate_size", "num_local_experts": ".num_local_experts",
        "num_experts_per_tok": ".num_experts_per_tok", "moe_layers": _routed, "attention_bias": _biased,
        "attention_chunk_size": ".attention_chunk_size", "layer_types": _kinds,
        "no_rope_layers": lambda m: [int(m.rotates(layer)) for layer in range(m.num_hidden_layers)],
        "use_qk_norm": lambda m: m.qk_norm == "unweighted", "floor_scale": ".floor_scale",
        "attn_scale": ".attn_scale", "attn_temperature_tuning": ".attn_temperature_tuning",
    },
    "Ernie4_5_MoeForCausalLM": {
        "model_type": "ernie4_5_moe", "intermediate_size": ".intermediate_size", "head_dim": ".head_dim",
        "moe_num_experts": ".num_local_experts", "moe_k": ".num_experts_per_tok", "use_bias": False,
        "moe_intermediate_size": ".moe_intermediate_size", "moe_num_shared_experts": _shared,
        "moe_layer_start_index": ".first_k_dense_replace",
    },
}  # fmt: skip


def to_config(spec: ModelSpec) -> Config:
    """config.json of the first architecture that says this very network. Raises MopError where none does,
    with the nearest: it has experts as the network has, and differs in the fewest fields."""
    others: list[tuple[bool, int, str]] = []
    for architecture in KEYS:
        config = _config(spec, architecture)
        try:
            read = from_config(config, architecture)
        except (MopError, ZeroDivisionError):
            continue
        fields = differences(read, spec)
        if not fields:
            return config
        said = [f"{one} {shown(getattr(read, one))}, not {shown(getattr(spec, one))}" for one in fields]
        other_kind = (read.num_local_experts > 0) != (spec.num_local_experts > 0)
        others.append((other_kind, len(fields), f"{architecture}, would have {'; '.join(said)}"))
    nearest = f"; the nearest, {min(others, key=lambda one: one[:2])[2]}" if others else ""
    known = "an architecture that is written (docs/fine-tune.md)"
    raise MopError(f"model: {spec.name} is no network of {known}{nearest}")


def _config(spec: ModelSpec, architecture: str) -> Config:
    keys = {**_COMMON, **KEYS[architecture]}
    shares = spec.moe_intermediate_size
    found: Config = {"architectures": [architecture]}
    for key, value in keys.items():
        if value is _shared and (not shares or spec.shared_expert_intermediate_size % shares):
            continue
        found[key] = _value(spec, value)
    scaling = spec.rope_scaling
    if scaling.rope_type != "default":
        plain = msgspec.to_builtins(scaling)
        names = _SCALING[scaling.rope_type]
        found["rope_scaling"] = {
            name: plain[name] for name in names if plain[name] or not name.startswith("mscale")
        }
        longest = round(scaling.factor * scaling.original_max_position_embeddings)
        found["max_position_embeddings"] = longest
    return found


_SCALING = {
    "yarn": (
        "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
        "mscale", "mscale_all_dim",
    ),
    "llama3": (
        "rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
    ),
}  # fmt: skip


def _value(spec: ModelSpec, value: Value) -> Any:
    if callable(value):
        return value(spec)
    return getattr(spec, value[1:]) if isinstance(value, str) and value.startswith(".") else value
