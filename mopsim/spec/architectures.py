"""What a Hugging Face config of each known architecture says: a reader for each, as transformers reads it."""

from collections.abc import Callable

from mopsim.common.errors import MopError
from mopsim.spec.config_parts import (
    Fields,
    attention_bias,
    dense_layers,
    late_windows,
    layer_flags,
    layer_list,
    layers_of,
    one_window,
    period_of,
    qwen_windows,
    routed_layers,
    windows,
)
from mopsim.spec.config_reader import ConfigReader


def _llama(r: ConfigReader) -> Fields:
    return attention_bias(r) | {
        "intermediate_size": r.integer("intermediate_size"),
        "ffn_bias": r.flag("mlp_bias"),
    }


def _mistral(r: ConfigReader) -> Fields:
    return {"intermediate_size": r.integer("intermediate_size")} | one_window(r)


def _mixtral(r: ConfigReader) -> Fields:
    return {
        "num_local_experts": r.integer("num_local_experts"),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": r.integer("intermediate_size"),
    } | one_window(r)


def _qwen2(r: ConfigReader) -> Fields:
    return {"intermediate_size": r.integer("intermediate_size"), "attention_bias": "qkv"} | qwen_windows(r)


def _qwen3(r: ConfigReader) -> Fields:
    return (
        attention_bias(r)
        | {
            "intermediate_size": r.integer("intermediate_size"),
            "qk_norm": "head",
        }
        | qwen_windows(r)
    )


def _qwen_experts(r: ConfigReader) -> Fields:
    dense, step = layer_list(r, "mlp_only_layers"), period_of(r, "decoder_sparse_step")
    return {
        "intermediate_size": r.integer("intermediate_size"),
        "num_local_experts": r.integer(r.present("num_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": r.integer("moe_intermediate_size"),
        "norm_topk_prob": r.flag("norm_topk_prob"),
    } | dense_layers(r, lambda layer: (layer + 1) % step == 0 and layer not in dense)


def _qwen2_moe(r: ConfigReader) -> Fields:
    shared = r.integer("shared_expert_intermediate_size")
    found = _qwen_experts(r) | {
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared > 0,
        "attention_bias": "qkv" if r.flag("qkv_bias") else "none",
    }
    r.has("sliding_window")
    if not r.flag("use_sliding_window"):
        return found
    if not r.has("layer_types"):
        rule = "is refused without layer_types: versions of transformers differ in the layers with a window"
        raise MopError(f"{r.origin}: use_sliding_window: True {rule}")
    return found | windows(r, lambda layer: False)


def _qwen3_moe(r: ConfigReader) -> Fields:
    r.has("sliding_window")
    window = one_window(r) if r.flag("use_sliding_window") else {}
    return _qwen_experts(r) | attention_bias(r) | {"qk_norm": "head"} | window


def _deepseek_experts(r: ConfigReader) -> Fields:
    """Layers and experts in the keys of DeepSeek's configs."""
    expert, first = r.integer("moe_intermediate_size"), r.integer("first_k_dense_replace")
    layers = (
        dense_layers(r, routed_layers(r, first))
        if first in range(len(layers_of(r)) + 1)
        else {"first_k_dense_replace": first}
    )
    return layers | {
        "intermediate_size": r.integer("intermediate_size"),
        "num_local_experts": r.integer(r.present("n_routed_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": r.integer("n_shared_experts") * expert,
        "norm_topk_prob": r.flag("norm_topk_prob"),
        "routed_scaling_factor": r.number("routed_scaling_factor"),
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
        "rope_interleave": r.flag("rope_interleave"),
    }


def _grouped(r: ConfigReader, method: str) -> Fields:
    """Groups of experts that a token is limited to; 'greedy' has none, whatever its keys say."""
    r.read |= {"n_group", "topk_group"}
    if method == "greedy":
        return {}
    groups = {"n_group": r.integer("n_group"), "topk_group": r.integer("topk_group")}
    return {"topk_method": method, **groups}


def _deepseek_v2(r: ConfigReader) -> Fields:
    method = r.word("topk_method")
    return _deepseek(r) | {"scoring_func": r.word("scoring_func")} | _grouped(r, method)


def _mtp(r: ConfigReader) -> Fields:
    return {"num_nextn_predict_layers": r.integer(r.present("num_nextn_predict_layers", "num_mtp_layers"))}


def _deepseek_v3(r: ConfigReader) -> Fields:
    r.must_be("topk_method", "noaux_tc", "its groups are scored by their best two experts")
    return _deepseek(r) | {"scoring_func": r.word("scoring_func")} | _mtp(r) | _grouped(r, "noaux_tc")


def _glm4_moe(r: ConfigReader) -> Fields:
    """Grouped queries of which half a head is rotated, the experts of DeepSeek-V3."""
    r.must_be("topk_method", "noaux_tc", "its groups are scored by their best two experts")
    return (
        _deepseek_experts(r)
        | {
            "attention_bias": "qkv" if r.flag("attention_bias") else "none",
            "qk_norm": "head" if r.flag("use_qk_norm") else "none",
            "partial_rotary_factor": r.number("partial_rotary_factor"),
            "scoring_func": r.word("scoring_func"),
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
        | attention_bias(r)
        | {"qk_norm": "head", "scoring_func": "sigmoid"}
        | late_windows(r)
        | _grouped(r, "noaux_tc")
    )


def _ernie4_5_moe(r: ConfigReader) -> Fields:
    """Experts chosen with a bias of balance, like DeepSeek-V3's, of softmax scores. MTP layers are in no code
    of transformers."""
    r.must_be("use_bias", False, "biases on all products cannot be expressed")
    r.passed |= {"num_nextn_predict_layers"}
    if r.number("moe_norm_min") > 1e-6:
        raise MopError(
            f"{r.origin}: moe_norm_min: must be at most 1e-6, so that weights of experts add up to 1"
        )
    expert, every = r.integer("moe_intermediate_size"), period_of(r, "moe_layer_interval")
    start, end = r.integer("moe_layer_start_index"), r.integer("moe_layer_end_index")
    last = len(layers_of(r)) - 1 if end == -1 else end
    return {
        "intermediate_size": r.integer("intermediate_size"),
        "num_local_experts": r.integer(r.present("moe_num_experts", "num_experts")),
        "num_experts_per_tok": r.integer(r.present("moe_k", "num_experts_per_tok")),
        "moe_intermediate_size": expert,
        "shared_expert_intermediate_size": r.integer("moe_num_shared_experts") * expert,
        "rope_interleave": True,
    } | dense_layers(r, lambda layer: start <= layer <= last and (layer + 1) % every == 0)


def _gpt_oss(r: ConfigReader) -> Fields:
    return (
        {
            "num_local_experts": r.integer("num_local_experts"),
            "num_experts_per_tok": r.integer(r.present("num_experts_per_tok", "experts_per_token")),
            "moe_intermediate_size": r.integer("intermediate_size"),
            "attention_sinks": True,
            "expert_bias": True,
            "router_bias": True,
            "swiglu_limit": r.number("swiglu_limit"),
            "swiglu_alpha": r.number("swiglu_alpha"),
        }
        | attention_bias(r)
        | windows(r, lambda layer: layer % 2 == 0)
    )


def _llama4(r: ConfigReader) -> Fields:
    """Every interleave_moe_layer_step-th layer has experts, beside one that is shared. Layers with rotary
    positions attend within chunks."""
    step = period_of(r, "interleave_moe_layer_step")
    listed, rotary = layer_list(r, "moe_layers"), layer_flags(r, "no_rope_layers")
    period = period_of(r, "no_rope_layer_interval")
    r.read |= {"attn_temperature_tuning", "floor_scale", "attn_scale"}
    left = ["layers without rotary positions are taken with them, their attention as not tempered"]
    left += ["norms of queries and keys, which have no weights, are left out"] * r.flag("use_qk_norm")
    expert = r.integer("intermediate_size")
    return (
        {
            "intermediate_size": r.integer("intermediate_size_mlp"),
            "num_local_experts": r.integer("num_local_experts"),
            "num_experts_per_tok": r.integer("num_experts_per_tok"),
            "moe_intermediate_size": expert,
            "shared_expert_intermediate_size": expert,
            "scoring_func": "sigmoid",
            "norm_topk_prob": False,
            "assumptions": (*left, "the weights of experts multiply their outputs, not their inputs"),
        }
        | attention_bias(r)
        | dense_layers(r, lambda at: at in listed if r.has("moe_layers") else (at + 1) % step == 0)
        | _chunks(r, lambda at: rotary[at] == 1 if rotary else (at + 1) % period != 0)
    )


def _chunks(r: ConfigReader, usual: Callable[[int], bool]) -> Fields:
    """Of layers that attend within chunks, which mopexec refuses; without any it would train what is left out
    here."""
    key = "attention_chunk_size"
    found = {} if r.is_null(key) else windows(r, usual, key)
    if not found:
        raise MopError(f"{r.origin}: {key}: cannot be expressed without layers that attend within chunks")
    return found


def _olmoe(r: ConfigReader) -> Fields:
    if r.has("clip_qkv"):
        raise MopError(f"{r.origin}: clip_qkv: clipped queries, keys and values cannot be expressed")
    return {
        "num_local_experts": r.integer(r.present("num_experts", "num_local_experts")),
        "num_experts_per_tok": r.integer("num_experts_per_tok"),
        "moe_intermediate_size": r.integer("intermediate_size"),
        "norm_topk_prob": r.flag("norm_topk_prob"),
        "qk_norm": "full",
    } | attention_bias(r)


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
    "Llama4ForCausalLM": _llama4,
}
TEXT_OF = {"Llama4ForConditionalGeneration": "Llama4ForCausalLM"}
"""Of architectures of several networks, that of their text."""
MODEL_TYPES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM", "dots1": "Dots1ForCausalLM", "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}  # fmt: skip
