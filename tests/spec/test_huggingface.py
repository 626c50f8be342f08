"""config.json of each known architecture, against the preset made by hand from the same network."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.spec.architectures import ARCHITECTURES, TEXT_OF
from mopsim.spec.presets import load_model
from mopsim.spec.tensors import total_params
from tests.spec.hybrid_configs import (
    DEEPSEEK_V3_2,
    GLM_4_7_FLASH,
    GLM_5_2,
    MINIMAX_M2,
    NEMOTRON_H,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    SOLAR_OPEN,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "use_sliding_window": False,
    "attention_bias": False,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 2560,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "shared_expert_intermediate_size": 20480,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "use_sliding_window": False,
    "sliding_window": 65536,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1000000.0,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
    "attention_bias": False,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "num_nextn_predict_layers": 0,
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "vocab_size": 102400,
    "first_k_dense_replace": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "vocab_size": 201088,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "attention_bias": True,
    "rope_theta": 150000,
    "rms_norm_eps": 1e-5,
}
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "vocab_size": 50304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
    "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 1600, "n_head": 25,
    "n_layer": 48, "n_positions": 1024, "output_past": True, "resid_pdrop": 0.1, "vocab_size": 50257,
}  # fmt: skip
"""openai-community/gpt2-xl."""
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "use_sliding_window": False,
    "sliding_window": 131072,
}
GLM4_MOE = {
    "architectures": ["Glm4MoeForCausalLM"], "hidden_size": 5120, "intermediate_size": 12288,
    "num_hidden_layers": 92, "vocab_size": 151552, "num_attention_heads": 96, "num_key_value_heads": 8,
    "head_dim": 128, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 3, "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1,
    "topk_group": 1, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA4 = {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "vision_config": {},
    "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "vocab_size": 202048,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False,
        "attention_chunk_size": 8192, "interleave_moe_layer_step": 2, "num_local_experts": 128,
        "num_experts_per_tok": 1, "no_rope_layers": [], "use_qk_norm": False, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
DOTS1 = {
    "architectures": ["Dots1ForCausalLM"], "hidden_size": 4096, "intermediate_size": 10944,
    "num_hidden_layers": 62, "vocab_size": 152064, "num_attention_heads": 32, "num_key_value_heads": 32,
    "first_k_dense_replace": 1, "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "norm_topk_prob": True, "n_group": 1,
    "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "sliding_window": None,
}  # fmt: skip
ERNIE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "vocab_size": 103424, "num_attention_heads": 20, "num_key_value_heads": 4,
    "head_dim": 128, "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27,
    "moe_layer_interval": 1, "use_bias": False, "rope_theta": 500000, "tie_word_embeddings": True,
}  # fmt: skip
TEXT: dict[str, Any] = LLAMA4["text_config"]  # type: ignore[assignment]
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "sliding_window": 4096}
CASES = {
    "llama3_8b": LLAMA,
    "mixtral_8x7b": MIXTRAL,
    "qwen3_8b": QWEN3,
    "qwen2_57b_a14b": QWEN2_MOE,
    "qwen3_30b_a3b": QWEN3_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss_20b": GPT_OSS,
    "olmoe_1b_7b": OLMOE,
    "glm4_5_355b_a32b": GLM4_MOE,
    "llama4_maverick": LLAMA4,
}
#: Fields that a preset takes from elsewhere than the config, or that shapes do not depend on.
BESIDE = {
    "name",
    "source",
    "assumptions",
    "total_params",
    "active_params",
    "rope_theta",
    "rms_norm_eps",
    "norm_topk_prob",
}
BESIDE |= {"intermediate_size"}  # all-MoE networks still carry one in their config


def without(key: str, config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("preset", CASES)
def test_a_config_reads_as_the_preset(preset: str, tmp_path: Path) -> None:
    read, expected = load_model(write(tmp_path, CASES[preset])), load_model(preset)
    for field in set(msgspec.structs.asdict(read)) - BESIDE:
        assert getattr(read, field) == getattr(expected, field), field
    if expected.num_dense_layers:
        assert read.intermediate_size == expected.intermediate_size
    text: dict[str, Any] = CASES[preset].get("text_config", CASES[preset])  # type: ignore[assignment]
    assert read.rope_theta == text.get("rope_theta", 10000.0)
    assert load_model(tmp_path) == read


def test_qwen2_and_mistral(tmp_path: Path) -> None:
    qwen = load_model(write(tmp_path, QWEN2))
    assert (qwen.attention_bias, qwen.sliding_window, qwen.head_dim) == ("qkv", 0, 128)
    mistral = load_model(write(tmp_path, MISTRAL))
    assert (mistral.attention_bias, mistral.sliding_window) == ("none", 4096)


def test_gpt2_is_of_its_own_keys(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, GPT2))
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (1600, 48, 25)
    assert (model.intermediate_size, model.learned_positions, model.ffn_matrices) == (6400, 1024, 2)
    assert (model.ffn_activation, model.norm, model.attention_bias) == (
        "gelu_pytorch_tanh",
        "layernorm",
        "qkvo",
    )
    assert model.tie_word_embeddings
    assert total_params(model) == 1_557_611_200
    for key, value, says in (
        ("n_embd", "wide", "n_embd: 'wide' must be an integer"),
        ("n_layer", None, "n_layer: missing"),
        ("activation_function", "silu", "ffn_activation: 'silu' is not one of"),
        ("scale_attn_weights", False, "scale_attn_weights: False is refused"),
        ("scale_attn_weights", None, "scale_attn_weights: None is refused"),
        ("hidden_size", 64, "hidden_size: 64 is refused: is not n_embd 1600, which it is another name of"),
        ("num_hidden_layers", 5, "num_hidden_layers: 5 is refused: is not n_layer 48"),
        ("num_attention_heads", 8, "num_attention_heads: 8 is refused: is not n_head 25"),
        ("max_position_embeddings", 128, "max_position_embeddings: 128 is refused: is not n_positions 1024"),
        ("num_key_value_heads", 5, "num_key_value_heads: 5 is refused: all n_head 25 have keys and values"),
        ("head_dim", 16, "head_dim: 16 is refused: heads are n_embd 1600 / n_head 25 wide"),
        ("n_head", 0, "n_head: 0 must be at least 1"),
        ("n_head", 3, "n_embd: 1600 must be divisible by n_head 3"),
        ("n_positions", 0, "n_positions: 0 must be at least 1"),
        ("n_inner", -1, r"model\.intermediate_size: -1 must not be negative \(from n_inner\)"),
    ):
        with pytest.raises(MopError, match=says):
            load_model(write(tmp_path, GPT2 | {key: value}))


def test_gpt2_may_have_the_names_that_its_class_maps(tmp_path: Path) -> None:
    """attribute_map of GPT2Config: both names are one."""
    mapped = {
        "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }  # fmt: skip
    said = load_model(write(tmp_path, GPT2))
    assert load_model(write(tmp_path, {mapped.get(key, key): value for key, value in GPT2.items()})) == said
    both = GPT2 | {other: GPT2[key] for key, other in mapped.items()}
    assert load_model(write(tmp_path, both | {"num_key_value_heads": 25, "head_dim": 64})) == said


def test_mtp_layers_are_those_that_a_config_says(tmp_path: Path) -> None:
    """transformers loads none, whatever its classes' default; Kimi-K2's keys are DeepSeek-V3's otherwise."""
    for config in (DEEPSEEK_V3, GLM4_MOE, DEEPSEEK_V3 | {"model_type": "kimi_k2"}):
        path = write(tmp_path, without("num_nextn_predict_layers", without("first_k_dense_replace", config)))
        model = load_model(path)
        assert model.num_nextn_predict_layers == 0
        assert model.first_k_dense_replace == (1 if config is GLM4_MOE else 3)


def test_every_architecture_is_covered_here() -> None:
    others = (
        QWEN2,
        MISTRAL,
        DOTS1,
        ERNIE,
        GPT2,
        QWEN3_NEXT,
        QWEN3_5_MOE,
        NEMOTRON_H,
        GLM_5_2,
        DEEPSEEK_V3_2,
        MINIMAX_M2,
        GLM_4_7_FLASH,
        SOLAR_OPEN,
    )
    said = {config["architectures"][0] for config in (*CASES.values(), *others)}  # type: ignore[index]
    assert {TEXT_OF.get(name, name) for name in said} == set(ARCHITECTURES)


def test_what_changes_no_network_is_read_over_and_the_rest_is_named(tmp_path: Path) -> None:
    whole = load_model(write(tmp_path, QWEN3_MOE))
    beside = {
        "model_type": "qwen3_moe", "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
        "eos_token_id": 151645, "max_window_layers": 48, "router_aux_loss_coef": 0.001, "use_cache": True,
        "attention_dropout": 0.0, "sliding_window": None, "index_topk": None, "is_encoder_decoder": False,
        "shared_expert_intermediate_size": 0, "partial_rotary_factor": 1.0, "num_local_experts": 128,
        "layer_types": ["full_attention"] * 48, "max_position_embeddings": 40960,
    }  # fmt: skip
    assert load_model(write(tmp_path, QWEN3_MOE | beside)) == whole
    named = load_model(write(tmp_path, QWEN3_MOE | {"attention_dropout": 0.1, "my_router_trick": 3}))
    assert named.assumptions == ("not read: 'attention_dropout', 'my_router_trick'",)
    assert msgspec.structs.replace(named, assumptions=()) == whole


def test_greedy_routing_has_no_groups_to_note(tmp_path: Path) -> None:
    """As DeepSeek-V2-Lite says it."""
    lite = DEEPSEEK_V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    model = load_model(write(tmp_path, lite))
    assert (model.topk_method, model.n_group, model.topk_group, model.assumptions) == ("greedy", 1, 1, ())
    assert load_model(write(tmp_path, lite | {"n_group": 8, "topk_group": 3})) == model
