"""Configs of Hugging Face that are wrong, or whose networks cannot be expressed: one line each."""

from pathlib import Path
from typing import Any

import pytest

from mopsim.common.errors import MopError
from mopsim.spec.presets import load_model
from tests.spec.test_huggingface import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS1,
    ERNIE,
    GPT_OSS,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    TEXT,
    without,
    write,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "'MambaForCausalLM' is not known; known ones: LlamaForCausalLM, Mistral",
        ),
        ({"architectures": "LlamaForCausalLM"}, "architectures: 'LlamaForCausalLM' must be a list of names"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "4096"}, "hidden_size: '4096' must be an integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small' must be a number"),
        ({"rms_norm_eps": None}, "rms_norm_eps: null is refused; without the key it is 1e-06"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1 must be true or false"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 must be at least 1"),
        ({"num_key_value_heads": 7}, "model.num_key_value_heads: 7 does not divide num_attention_heads 32"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MopError) as refused:
        load_model(write(tmp_path, LLAMA | change))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step: 0 must be at least 1"),
        (QWEN3_MOE | {"mlp_only_layers": [48]}, r"mlp_only_layers: \[48\] must name layers below num_hidden"),
        (QWEN3_MOE | {"mlp_only_layers": [True]}, r"mlp_only_layers: \[True\] must name layers"),
        (
            QWEN3_MOE | {"mlp_only_layers": [3], "intermediate_size": 0},
            r"where a layer is dense \(from mlp_only",
        ),
        (
            QWEN2 | {"use_sliding_window": True, "num_hidden_layers": 30, "sliding_window": 0},
            "layer_types: .* which needs a sliding_window",
        ),
        (QWEN2_MOE | {"use_sliding_window": True}, "use_sliding_window: True is refused without layer_types"),
        (
            GPT_OSS | {"layer_types": ["chunked_attention"] * 24},
            "layer_types: .* only full_attention or slid",
        ),
        (GPT_OSS | {"layer_types": ["full_attention"] * 23}, "layer_types: .* num_hidden_layers 24"),
        (GPT_OSS | {"sliding_window": None}, "sliding_window: null is refused; without the key it is 128"),
        (
            without("num_key_value_heads", DEEPSEEK_V3 | {"num_attention_heads": 64}),
            r"heads 64 \(absent: what",
        ),
        (without("n_group", DEEPSEEK_V2), "n_group: missing, the field is required"),
        (without("n_shared_experts", DOTS1), "n_shared_experts: missing, the field is required"),
        (DEEPSEEK_V3 | {"moe_layer_freq": 0}, "moe_layer_freq: 0 must be at least 1"),
        (
            DEEPSEEK_V3 | {"moe_layer_freq": [1, 0]},
            r"moe_layer_freq: \[1, 0\] must be 0 or 1 for each of num_h",
        ),
        (DEEPSEEK_V3 | {"first_k_dense_replace": 62}, "first_k_dense_replace: 62 is more than num_hidden"),
        (DOTS1 | {"scoring_func": "softmax"}, "scoring_func: 'softmax' is refused"),
        (ERNIE | {"use_bias": True}, "use_bias: True is refused"),
        (TEXT | {"attention_chunk_size": None}, "attention_chunk_size: cannot be expressed without"),
        (
            TEXT | {"layer_types": ["full_attention"] * 48},
            "attention_chunk_size: cannot be expressed without",
        ),
        (
            TEXT | {"no_rope_layers": [1, 0] * 24, "layer_types": ["chunked_attention"] * 48},
            "no_rope_layers: .* cannot be expressed beside layer_types",
        ),
        (
            TEXT | {"layer_types": ["full_attention", *["chunked_attention"] * 3] * 12},
            "no_rope_layers: .* cannot be expressed beside layer_types",
        ),
        (TEXT | {"no_rope_layers": [1, 2]}, r"no_rope_layers: \[1, 2\] must be 0 or 1 for each"),
        (TEXT | {"moe_layers": [48]}, r"moe_layers: \[48\] must name layers below"),
        (ERNIE | {"moe_norm_min": 0.1}, "moe_norm_min: must be at most"),
        (
            QWEN3_MOE | {"layer_types": ["linear_attention"] * 48},
            "layer_types: .* only full_attention, one for each of num_hidden_layers 48",
        ),
        (
            QWEN3_MOE | {"layer_types": ["sliding_attention", "full_attention"] * 24, "sliding_window": 4096},
            "layer_types: .* only full_attention",
        ),
        (QWEN3_MOE | {"layer_types": ["full_attention"] * 47}, "layer_types: .* num_hidden_layers 48"),
        (MISTRAL | {"layer_types": ["full_attention"] * 32}, "layer_types: .* only sliding_attention"),
        (GPT_OSS | {"layer_types": "full_attention"}, "layer_types: 'full_attention' must be a list"),
        (DEEPSEEK_V3 | {"index_topk": 2048}, "index_topk: 2048 is refused for DeepseekV3.*: sparse"),
        (QWEN3_MOE | {"model_type": "mamba"}, "model_type: 'mamba' is refused: Qwen3MoeForCausalLM is of"),
        (QWEN3_MOE | {"model_type": 7}, "model_type: 7 is refused"),
        (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder: True is refused for Llama.*: only dec"),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts: 8 is refused for Llama.*: it has no such exp"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is refused for Llama"),
        (MIXTRAL | {"n_shared_experts": 1}, "n_shared_experts: 1 is refused for Mixtral"),
        (QWEN3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is refused for Qwen3"),
        (QWEN3_MOE | {"num_local_experts": 64}, "num_local_experts: 64 is refused: is not num_experts 128"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MopError, match=message):
        load_model(write(tmp_path, config))
