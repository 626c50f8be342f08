"""Small random models of transformers, one or more for each family of weights."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

SEQ, BATCH = 24, 2
_COMMON: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "attn_implementation": "eager", "rms_norm_eps": 1e-5,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
    "beta_slow": 1.0, "rope_theta": 10000.0,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "intermediate_size": 40, "moe_intermediate_size": 20,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
    "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt2, two weights": (
        "GPT2",
        {
            "tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "activation_function": "gelu",
        },
    ),
    "llama": (
        "Llama",
        {
            "num_key_value_heads": 2, "intermediate_size": 40,
            "rope_parameters": {
                "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16, "rope_theta": 10000.0,
            },
        },
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        {
            "num_key_value_heads": 2, "intermediate_size": 40, "use_sliding_window": True,
            "sliding_window": 5, "max_window_layers": 1,
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_key_value_heads": 2, "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 20, "num_experts": 8,
            "num_experts_per_tok": 3, "norm_topk_prob": True, "intermediate_size": 40, "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe, every second": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 20, "num_experts": 8,
            "num_experts_per_tok": 3, "intermediate_size": 40, "num_hidden_layers": 4,
            "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5,
        },
    ),
    "qwen2_moe, dense layers and windows between": (
        "Qwen2Moe",
        {
            "num_key_value_heads": 2, "moe_intermediate_size": 20, "num_experts": 8,
            "num_experts_per_tok": 3, "intermediate_size": 40, "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3, late windows": (
        "Qwen3",
        {
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40, "use_sliding_window": True,
            "sliding_window": 5, "max_window_layers": 1,
        },
    ),
    "qwen3, one weight": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40, "tie_word_embeddings": True},
    ),
    "dots1": (
        "Dots1",
        {
            "num_key_value_heads": 2, "intermediate_size": 40, "moe_intermediate_size": 20,
            "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
            "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
            "norm_topk_prob": True, "sliding_window": 5, "max_window_layers": 2,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "num_key_value_heads": 2, "intermediate_size": 40, "moe_intermediate_size": 20,
            "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "tie_word_embeddings": False,
        },
    ),
    "olmoe": (
        "Olmoe",
        {"num_key_value_heads": 4, "intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20, "num_local_experts": 8,
            "num_experts_per_tok": 3, "sliding_window": 5, "swiglu_limit": 0.02,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
    "gpt_oss, one full layer": (
        "GptOss",
        {
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20, "num_local_experts": 8,
            "num_experts_per_tok": 3, "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": 20,
            "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_group": 4,
            "topk_group": 2, "routed_scaling_factor": 1.5, "attention_bias": True, "use_qk_norm": True,
            "num_mtp_layers": 0,
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 40,
            "intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 7, "no_rope_layers": [1, 1, 0, 1],
            "floor_scale": 3, "attn_scale": 0.5, "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "llama4, two experts without norms": (
        "Llama4Text",
        {
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 40, "intermediate_size": 20,
            "num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": [0, 2], "attention_chunk_size": 7,
            "no_rope_layers": [0, 1, 0], "floor_scale": 3, "attn_scale": 0.5, "use_qk_norm": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "deepseek_v2": ("DeepseekV2", _LATENT | {"topk_method": "group_limited_greedy"}),
    "glm4_moe_lite": ("Glm4MoeLite", _LATENT | {"num_mtp_layers": 0, "norm_topk_prob": True}),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20, "num_local_experts": 8,
            "num_experts_per_tok": 3, "rotary_dim": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "solar_open": (
        "SolarOpen",
        {
            "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 20, "n_routed_experts": 8,
            "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": ("DeepseekV3", _LATENT | {"num_mtp_layers": 0, "norm_topk_prob": True}),
}  # fmt: skip


def make(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model; also biases, norms and correction biases are drawn, so that a mistake in any shows."""
    name, fields = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(_COMMON | fields | changes))
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if "norm" in tensor_name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(dtype))
            elif "bias" in tensor_name or "sinks" in tensor_name:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator).to(dtype))
            else:
                tensor.mul_(3)
    return model.train()


def save(model: Any, folder: Path) -> Path:
    """The directory that transformers writes."""
    model.save_pretrained(folder)
    return folder


def with_gradients(model: Any) -> Any:
    """The model with each parameter's gradient in its place."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for target, parameter in zip(copied.parameters(), model.parameters(), strict=True):
            target.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    return copied


def tokens() -> torch.Tensor:
    """[BATCH, SEQ + 1]."""
    return torch.randint(0, 61, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(2))
