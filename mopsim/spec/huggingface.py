"""A Hugging Face config.json read as a ModelSpec. Nothing is downloaded: the file is local."""

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import msgspec

from mopsim.common.errors import MopError, shown
from mopsim.common.io import convert
from mopsim.common.values import first_unreadable
from mopsim.spec.config_reader import Config, ConfigReader
from mopsim.spec.model import ModelSpec, RopeScaling

Fields = dict[str, Any]


def from_config(config: Config, origin: str) -> ModelSpec:
    """ModelSpec of a config.json's fields. Raises MopError naming the field, or the unknown architecture."""
    unreadable = first_unreadable(config)
    if unreadable:
        raise MopError(f"{origin}: {unreadable[0]}: {unreadable[1]}")
    architecture = _architecture(config, origin)
    reader = ConfigReader(config, origin)
    fields = _common(reader) | ARCHITECTURES[architecture](reader)
    fields["name"] = _name(config, origin, architecture)
    fields["source"] = f"{architecture} config, {PurePath(origin).name}"
    fields["assumptions"] = reader.unread(architecture)
    try:
        model = convert(fields, ModelSpec, "model", origin)
    except MopError as error:
        raise MopError(f"{error}{_read_from(str(error), config)}") from None
    _check_layer_types(reader, model)
    return model


def _check_layer_types(r: ConfigReader, model: ModelSpec) -> None:
    """Refuse `layer_types` that are not the layers of the network that was read."""
    kinds, layers = r.items("layer_types"), range(model.num_hidden_layers)
    if not r.has("layer_types"):
        return
    windowed = ["sliding_attention" if model.window(layer) else "full_attention" for layer in layers]
    if kinds != windowed:
        each = {0: "full_attention", 1: "sliding_attention"}
        period = model.sliding_window_period if model.sliding_window else 0
        rule = each.get(period, "sliding and full in turn")
        raise MopError(
            f"{r.origin}: layer_types: {shown(kinds)} is refused: only {rule}, one for each of "
            f"num_hidden_layers {len(layers)}, can be expressed of this architecture"
        )


def _read_from(message: str, config: Config) -> str:
    """' (from KEY)' where the refused field of ModelSpec has other names in a config."""
    field = re.search(r"model\.(\w+)", message)
    keys = [key for key in _OTHER_NAMES.get(field.group(1), ()) if key in config] if field else []
    return f" (from {', '.join(keys)})" if keys else ""


def _architecture(config: Config, origin: str) -> str:
    listed = config.get("architectures")
    if listed is not None and not (
        isinstance(listed, list) and all(isinstance(item, str) for item in listed)
    ):
        raise MopError(f"{origin}: architectures: {shown(listed)} must be a list of names")
    kind = config.get("model_type")
    for name in listed or []:
        if name not in ARCHITECTURES:
            continue
        kinds = [one for one, meant in MODEL_TYPES.items() if meant == name]
        if kind is not None and kind not in kinds:
            rule = f"is refused: {name} is of model_type {' or '.join(kinds)}"
            raise MopError(f"{origin}: model_type: {shown(kind)} {rule}")
        return str(name)
    if not listed and isinstance(kind, str) and kind in MODEL_TYPES:
        return MODEL_TYPES[kind]
    said = listed[0] if listed else kind
    raise MopError(
        f"{origin}: architectures: {shown(said)} is not known; known ones: {', '.join(ARCHITECTURES)}; "
        f"another network can be given as a YAML file of {', '.join(_NEEDED)}, with experts also "
        "num_local_experts, num_experts_per_tok, moe_intermediate_size, else intermediate_size"
    )


def _name(config: Config, origin: str, architecture: str) -> str:
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/"):
        return PurePath(given).name
    path = PurePath(origin)
    return path.parent.name if path.name == "config.json" and path.parent.name else path.stem or architecture


def _common(r: ConfigReader) -> Fields:
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


def _window(r: ConfigReader) -> Fields:
    """A sliding window over every layer (Mistral, Mixtral); Qwen's is off unless use_sliding_window."""
    if r.has("sliding_window") and r.flag("use_sliding_window", True):
        return {"sliding_window": r.integer("sliding_window")}
    return {}


def _no_window(r: ConfigReader) -> None:
    """Qwen's `sliding_window` says nothing unless use_sliding_window."""
    r.has("sliding_window")
    r.must_be("use_sliding_window", False, "a window over some of the layers only cannot be expressed")


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
    _no_window(r)
    return {"intermediate_size": r.integer("intermediate_size"), "attention_bias": "qkv"}


def _qwen3(r: ConfigReader) -> Fields:
    _no_window(r)
    return _attention_bias(r) | {
        "intermediate_size": r.integer("intermediate_size"),
        "head_dim": r.integer("head_dim", 128),
        "qk_norm": "head",
    }


def _qwen_experts(r: ConfigReader) -> Fields:
    _no_window(r)
    r.must_be("decoder_sparse_step", 1, "dense layers between MoE layers cannot be expressed")
    dense = r.items("mlp_only_layers")
    if dense != list(range(len(dense))):
        raise MopError(
            f"{r.origin}: mlp_only_layers: {shown(dense)} is refused: only leading dense layers can be "
            "expressed"
        )
    return {
        "intermediate_size": r.integer("intermediate_size"),
        "first_k_dense_replace": len(dense),
        "num_local_experts": r.integer(r.present("num_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": r.integer("moe_intermediate_size"),
        "norm_topk_prob": r.flag("norm_topk_prob", False),
    }


def _qwen2_moe(r: ConfigReader) -> Fields:
    shared = r.integer("shared_expert_intermediate_size")
    return _qwen_experts(r) | {
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared > 0,
        "attention_bias": "qkv" if r.flag("qkv_bias", True) else "none",
    }


def _qwen3_moe(r: ConfigReader) -> Fields:
    return _qwen_experts(r) | _attention_bias(r) | {"qk_norm": "head"}


def _deepseek(r: ConfigReader) -> Fields:
    r.must_be("moe_layer_freq", 1, "dense layers between MoE layers cannot be expressed")
    r.must_be("attention_bias", False, "biases on latent attention cannot be expressed")
    expert = r.integer("moe_intermediate_size")
    nope, rope = r.integer("qk_nope_head_dim"), r.integer("qk_rope_head_dim")
    return {
        "attention": "mla",
        "head_dim": nope + rope,
        "q_lora_rank": r.integer("q_lora_rank", 0),
        "kv_lora_rank": r.integer("kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": r.integer("v_head_dim"),
        "intermediate_size": r.integer("intermediate_size"),
        "first_k_dense_replace": r.integer("first_k_dense_replace", 0),
        "num_local_experts": r.integer(r.present("n_routed_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": r.integer("n_shared_experts", 0) * expert,
        "norm_topk_prob": r.flag("norm_topk_prob", False),
        "routed_scaling_factor": r.number("routed_scaling_factor", 1.0),
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


def _deepseek_v3(r: ConfigReader) -> Fields:
    r.must_be("topk_method", "noaux_tc", "its groups are scored by their best two experts")
    return (
        _deepseek(r)
        | {
            "scoring_func": r.word("scoring_func", "sigmoid"),
            "norm_topk_prob": r.flag("norm_topk_prob", True),
            "num_nextn_predict_layers": r.integer(r.present("num_nextn_predict_layers", "num_mtp_layers"), 0),
        }
        | _grouped(r, "noaux_tc")
    )


def _gpt_oss(r: ConfigReader) -> Fields:
    return (
        {
            "num_local_experts": r.integer("num_local_experts"),
            "num_experts_per_tok": r.integer(r.present("num_experts_per_tok", "experts_per_token")),
            "moe_intermediate_size": r.integer("intermediate_size"),
            "sliding_window": r.integer("sliding_window"),
            "sliding_window_period": 2,
            "attention_sinks": True,
            "expert_bias": True,
            "router_bias": True,
            "swiglu_limit": r.number("swiglu_limit", 7.0),
            "swiglu_alpha": r.number("swiglu_alpha", 1.702),
            "rms_norm_eps": r.number("rms_norm_eps", 1e-5),
        }
        | _attention_bias(r, True)
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
}
_NEEDED = tuple(field.name for field in msgspec.structs.fields(ModelSpec) if field.required)
#: Fields of ModelSpec and the keys of configs that they are read from under another name.
_OTHER_NAMES = {
    "num_local_experts": ("num_experts", "n_routed_experts"),
    "moe_intermediate_size": ("intermediate_size",),
    "shared_expert_intermediate_size": ("n_shared_experts",),
    "shared_expert_gate": ("shared_expert_intermediate_size",),
    "first_k_dense_replace": ("mlp_only_layers",),
    "head_dim": ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"),
    "qk_rope_head_dim": ("qk_nope_head_dim",),
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "olmoe": "OlmoeForCausalLM",
}  # fmt: skip
