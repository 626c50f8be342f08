"""What a Hugging Face config of each known architecture says: a reader for each, as transformers reads it."""

from collections.abc import Callable
from typing import Any

import msgspec

from mopsim.common.errors import MopError, shown
from mopsim.spec.config_reader import Config, ConfigReader
from mopsim.spec.model import LAYER_TYPES, MOST_LAYERS, RopeScaling, dense_fields, window_fields

Fields = dict[str, Any]


def common(r: ConfigReader) -> Fields:
    heads = r.integer("num_attention_heads")
    hidden = r.integer("hidden_size")
    r.must_be("hidden_act", "silu", "only SwiGLU can be expressed")
    if heads < 1:
        raise MopError(f"{r.origin}: num_attention_heads: {heads} must be at least 1")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": r.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": r.integer("num_key_value_heads", heads),
        "head_dim": r.integer("head_dim", hidden // heads),
        "vocab_size": r.integer("vocab_size"),
        "tie_word_embeddings": r.flag("tie_word_embeddings", False),
        "rms_norm_eps": r.number("rms_norm_eps", 1e-6),
    } | _rope(r)


_SCALING = {field.name: field.default for field in msgspec.structs.fields(RopeScaling)}


def _rope(r: ConfigReader, theta: float = 10000.0, usual: Config | None = None) -> Fields:
    """Rotary positions: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` with both.
    theta, usual: where the config has neither."""
    key = "rope_parameters" if r.has("rope_parameters") else "rope_scaling"
    given = r.mapping(key, usual or {})
    inner = ConfigReader(given, f"{r.origin}: {key}")
    found = {"rope_theta": inner.number("rope_theta", r.number("rope_theta", theta))}
    r.read |= {"rope_parameters", "rope_scaling", "rope_theta"}
    if given and not {"rope_type", "type", "rope_theta"} & given.keys():
        raise MopError(f"{inner.origin}: rope_type: missing, the field is required")
    field = inner.present("rope_type", "type")
    kind = given.get(field) or "default"
    if kind == "default":
        return found
    if kind not in ("yarn", "llama3"):
        raise MopError(f"{inner.origin}: {field}: {shown(kind)} is refused: yarn and llama3 can be expressed")
    if inner.has("attention_factor"):
        raise MopError(f"{inner.origin}: attention_factor: cannot be expressed, only YaRN's own rule")
    scaling: Fields = {"rope_type": kind}
    longest = r.integer("max_position_embeddings", 0)
    original = inner.integer("original_max_position_embeddings", longest)
    scaling["original_max_position_embeddings"] = original
    scaling["factor"] = inner.number("factor", longest / original if original else None)
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"):
        scaling[name] = inner.number(name, float(_SCALING[name]))
    return found | {"rope_scaling": scaling | {"truncate": inner.flag("truncate", True)}}


def _layers(r: ConfigReader) -> range:
    """Decoder layers; what ModelSpec refuses as their number makes no long range here."""
    return range(min(r.integer("num_hidden_layers"), MOST_LAYERS))


def _window(r: ConfigReader) -> Fields:
    """A sliding window over every layer (Mistral, Mixtral); Qwen3-MoE's is off unless use_sliding_window."""
    if r.has("sliding_window") and r.flag("use_sliding_window", True):
        return {"sliding_window": r.integer("sliding_window")}
    return {}


def _windows(r: ConfigReader, usual: Callable[[int], bool]) -> Fields:
    """Windows of the layers in `layer_types`; usual: whether a layer has one in a config without."""
    layers = _layers(r)
    windowed = [usual(layer) for layer in layers]
    if r.has("layer_types"):
        types = r.items("layer_types")
        if len(types) != len(layers) or not all(one in LAYER_TYPES for one in types):
            rule = f"{' or '.join(LAYER_TYPES)} for each of num_hidden_layers {len(layers)}"
            raise MopError(
                f"{r.origin}: layer_types: {shown(types)} is refused: only {rule} can be expressed"
            )
        windowed = [one == LAYER_TYPES[True] for one in types]
    window = r.integer("sliding_window", None if any(windowed) else 0)
    return window_fields(windowed, window)


def _late_windows(r: ConfigReader, most: int) -> Fields:
    """Windows of the layers after the first max_window_layers; most: where the config has none of these."""
    full = r.integer("max_window_layers", most)
    return _windows(r, lambda layer: layer >= full) if r.has("sliding_window") else {}


def _qwen_windows(r: ConfigReader) -> Fields:
    """Qwen's `sliding_window` says nothing unless use_sliding_window."""
    r.has("sliding_window")
    return _late_windows(r, 28) if r.flag("use_sliding_window", False) else {}


def _dense(r: ConfigReader, routed: Callable[[int], bool]) -> Fields:
    """Of a network with experts, in whose layers `routed` says whether they are."""
    layers = _layers(r)
    return dense_fields((layer for layer in layers if not routed(layer)), len(layers))


def _period(r: ConfigReader, key: str) -> int:
    """Every so many layers one is of a kind."""
    found = r.integer(key, 1)
    if found < 1:
        raise MopError(f"{r.origin}: {key}: {found} must be at least 1")
    return found


def _attention_bias(r: ConfigReader, usual: bool = False) -> Fields:
    return {"attention_bias": "qkvo" if r.flag("attention_bias", usual) else "none"}


def _llama(r: ConfigReader) -> Fields:
    return _attention_bias(r) | {
        "intermediate_size": r.integer("intermediate_size"),
        "ffn_bias": r.flag("mlp_bias", False),
    }


def _mistral(r: ConfigReader) -> Fields:
    return {"intermediate_size": r.integer("intermediate_size")} | _window(r)


def _mixtral(r: ConfigReader) -> Fields:
    return {
        "num_local_experts": r.integer("num_local_experts", 8),
        "num_experts_per_tok": r.integer("num_experts_per_tok", 2),
        "moe_intermediate_size": r.integer("intermediate_size"),
    } | _window(r)


def _qwen2(r: ConfigReader) -> Fields:
    return {"intermediate_size": r.integer("intermediate_size"), "attention_bias": "qkv"} | _qwen_windows(r)


def _qwen3(r: ConfigReader) -> Fields:
    return (
        _attention_bias(r)
        | {
            "intermediate_size": r.integer("intermediate_size"),
            "head_dim": r.integer("head_dim", 128),
            "qk_norm": "head",
        }
        | _qwen_windows(r)
    )


def _qwen_experts(r: ConfigReader) -> Fields:
    dense, step, layers = r.items("mlp_only_layers"), _period(r, "decoder_sparse_step"), _layers(r)
    if not all(type(one) is int and one in layers for one in dense):
        rule = f"must name layers below num_hidden_layers {len(layers)}"
        raise MopError(f"{r.origin}: mlp_only_layers: {shown(dense)} {rule}")
    return {
        "intermediate_size": r.integer("intermediate_size"),
        "num_local_experts": r.integer(r.present("num_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": r.integer("moe_intermediate_size"),
        "norm_topk_prob": r.flag("norm_topk_prob", False),
    } | _dense(r, lambda layer: (layer + 1) % step == 0 and layer not in dense)


def _qwen2_moe(r: ConfigReader) -> Fields:
    shared = r.integer("shared_expert_intermediate_size")
    found = _qwen_experts(r) | {
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared > 0,
        "attention_bias": "qkv" if r.flag("qkv_bias", True) else "none",
    }
    r.has("sliding_window")
    if not r.flag("use_sliding_window", False):
        return found
    if not r.has("layer_types"):
        rule = "is refused without layer_types: versions of transformers differ in the layers with a window"
        raise MopError(f"{r.origin}: use_sliding_window: True {rule}")
    return found | _windows(r, lambda layer: False)


def _qwen3_moe(r: ConfigReader) -> Fields:
    r.has("sliding_window")
    window = _window(r) if r.flag("use_sliding_window", False) else {}
    return _qwen_experts(r) | _attention_bias(r) | {"qk_norm": "head"} | window


def _routed(r: ConfigReader) -> Callable[[int], bool]:
    """Whether a layer has experts, in the keys of DeepSeek's own model code: those after the first
    first_k_dense_replace, of them every moe_layer_freq-th, or those that this is a list of 1 for."""
    first, layers = r.integer("first_k_dense_replace", 0), _layers(r)
    if not isinstance(r.config.get("moe_layer_freq"), list):
        every = _period(r, "moe_layer_freq")
        return lambda layer: layer >= first and layer % every == 0
    each = r.items("moe_layer_freq")
    if len(each) != len(layers) or not all(type(one) is int and one in (0, 1) for one in each):
        rule = f"must be 0 or 1 for each of num_hidden_layers {len(layers)}"
        raise MopError(f"{r.origin}: moe_layer_freq: {shown(each)} {rule}")
    return lambda layer: layer >= first and each[layer] == 1


def _deepseek_experts(r: ConfigReader) -> Fields:
    """Layers and experts in the keys of DeepSeek's configs."""
    expert, first = r.integer("moe_intermediate_size"), r.integer("first_k_dense_replace", 0)
    dense = _dense(r, _routed(r)) if first in range(len(_layers(r)) + 1) else {"first_k_dense_replace": first}
    return dense | {
        "intermediate_size": r.integer("intermediate_size"),
        "num_local_experts": r.integer(r.present("n_routed_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": r.integer("n_shared_experts", 0) * expert,
        "norm_topk_prob": r.flag("norm_topk_prob", False),
        "routed_scaling_factor": r.number("routed_scaling_factor", 1.0),
    }


def _deepseek(r: ConfigReader) -> Fields:
    r.must_be("attention_bias", False, "biases on latent attention cannot be expressed")
    nope, rope = r.integer("qk_nope_head_dim"), r.integer("qk_rope_head_dim")
    return _deepseek_experts(r) | {
        "attention": "mla",
        "head_dim": nope + rope,
        "q_lora_rank": r.integer("q_lora_rank", 0),
        "kv_lora_rank": r.integer("kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": r.integer("v_head_dim"),
        "rope_interleave": r.flag("rope_interleave", True),
    }


def _grouped(r: ConfigReader, method: str) -> Fields:
    """Groups of experts that a token is limited to; 'greedy' has none, whatever its keys say."""
    r.read |= {"n_group", "topk_group"}
    if method == "greedy":
        return {}
    groups = {"n_group": r.integer("n_group", 1), "topk_group": r.integer("topk_group", 1)}
    return {"topk_method": method, **groups}


def _deepseek_v2(r: ConfigReader) -> Fields:
    method = r.word("topk_method", "greedy")
    return _deepseek(r) | {"scoring_func": r.word("scoring_func", "softmax")} | _grouped(r, method)


def _mtp(r: ConfigReader) -> Fields:
    return {"num_nextn_predict_layers": r.integer(r.present("num_nextn_predict_layers", "num_mtp_layers"), 0)}


def _deepseek_v3(r: ConfigReader) -> Fields:
    r.must_be("topk_method", "noaux_tc", "its groups are scored by their best two experts")
    return (
        _deepseek(r)
        | {
            "scoring_func": r.word("scoring_func", "sigmoid"),
            "norm_topk_prob": r.flag("norm_topk_prob", True),
        }
        | _mtp(r)
        | _grouped(r, "noaux_tc")
    )


def _glm4_moe(r: ConfigReader) -> Fields:
    """Grouped queries of which half a head is rotated, the experts of DeepSeek-V3."""
    r.must_be("topk_method", "noaux_tc", "its groups are scored by their best two experts")
    return (
        _deepseek_experts(r)
        | {
            "attention_bias": "qkv" if r.flag("attention_bias", False) else "none",
            "qk_norm": "head" if r.flag("use_qk_norm", False) else "none",
            "partial_rotary_factor": r.number("partial_rotary_factor", 0.5),
            "scoring_func": r.word("scoring_func", "sigmoid"),
            "norm_topk_prob": r.flag("norm_topk_prob", True),
            "rms_norm_eps": r.number("rms_norm_eps", 1e-5),
        }
        | _mtp(r)
        | _grouped(r, "noaux_tc")
    )


def _dots1(r: ConfigReader) -> Fields:
    """Qwen3's attention, the experts of DeepSeek-V3; its configs call their routing `scoring_func`."""
    for key in ("topk_method", "scoring_func"):
        r.must_be(key, "noaux_tc", "its groups are scored by their best two experts")
    return (
        _deepseek_experts(r)
        | _attention_bias(r)
        | {"qk_norm": "head", "scoring_func": "sigmoid"}
        | _late_windows(r, 62)
        | _grouped(r, "noaux_tc")
    )


def _ernie4_5_moe(r: ConfigReader) -> Fields:
    """Experts chosen with a bias of balance, like DeepSeek-V3's, of softmax scores. MTP layers are in no code
    of transformers."""
    r.must_be("use_bias", False, "biases on all products cannot be expressed")
    r.passed |= {"num_nextn_predict_layers"}
    if r.number("moe_norm_min", 1e-12) > 1e-6:
        raise MopError(
            f"{r.origin}: moe_norm_min: must be at most 1e-6, so that weights of experts add up to 1"
        )
    expert, every = r.integer("moe_intermediate_size"), _period(r, "moe_layer_interval")
    start, end = r.integer("moe_layer_start_index", 1), r.integer("moe_layer_end_index", -1)
    last = len(_layers(r)) - 1 if end == -1 else end
    return (
        {
            "intermediate_size": r.integer("intermediate_size"),
            "num_local_experts": r.integer(r.present("moe_num_experts", "num_experts")),
            "num_experts_per_tok": r.integer(r.present("moe_k", "num_experts_per_tok")),
            "moe_intermediate_size": expert,
            "shared_expert_intermediate_size": r.integer("moe_num_shared_experts", 2) * expert,
            "tie_word_embeddings": r.flag("tie_word_embeddings", True),
            "rms_norm_eps": r.number("rms_norm_eps", 1e-5),
            "rope_interleave": True,
        }
        | _dense(r, lambda layer: start <= layer <= last and (layer + 1) % every == 0)
        | _rope(r, 500000.0)
    )


def _gpt_oss(r: ConfigReader) -> Fields:
    return (
        {
            "num_local_experts": r.integer("num_local_experts"),
            "num_experts_per_tok": r.integer(r.present("num_experts_per_tok", "experts_per_token")),
            "moe_intermediate_size": r.integer("intermediate_size"),
            "attention_sinks": True,
            "expert_bias": True,
            "router_bias": True,
            "swiglu_limit": r.number("swiglu_limit", 7.0),
            "swiglu_alpha": r.number("swiglu_alpha", 1.702),
            "rms_norm_eps": r.number("rms_norm_eps", 1e-5),
        }
        | _attention_bias(r, True)
        | _windows(r, lambda layer: layer % 2 == 0)
        | _rope(r, 150000.0, _GPT_OSS_ROPE)
    )


_GPT_OSS_ROPE: Config = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""What a GPT-OSS config means that says nothing of it (openai/gpt-oss-20b config.json)."""


def _olmoe(r: ConfigReader) -> Fields:
    if r.has("clip_qkv"):
        raise MopError(f"{r.origin}: clip_qkv: clipped queries, keys and values cannot be expressed")
    return {
        "num_local_experts": r.integer(r.present("num_experts", "num_local_experts"), 64),
        "num_experts_per_tok": r.integer("num_experts_per_tok", 8),
        "moe_intermediate_size": r.integer("intermediate_size"),
        "norm_topk_prob": r.flag("norm_topk_prob", False),
        "qk_norm": "full",
        "rms_norm_eps": r.number("rms_norm_eps", 1e-5),
    } | _attention_bias(r)


ARCHITECTURES: dict[str, Callable[[ConfigReader], Fields]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "GptOssForCausalLM": _gpt_oss,
    "OlmoeForCausalLM": _olmoe,
    "Glm4MoeForCausalLM": _glm4_moe,
    "Dots1ForCausalLM": _dots1,
    "Ernie4_5_MoeForCausalLM": _ernie4_5_moe,
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM", "dots1": "Dots1ForCausalLM", "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
}  # fmt: skip
