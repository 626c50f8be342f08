"""config.json of networks with linear attention: as transformers builds them, as the presets made by hand."""

import json
import random
from itertools import chain
from typing import Any

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.tensors import total_params
from tests.spec.hybrid_configs import NEMOTRON_3_SUPER, NEMOTRON_H, QWEN3_5_MOE, QWEN3_5_TEXT, QWEN3_NEXT

BESIDE = {
    "name", "source", "assumptions", "total_params", "active_params", "rope_theta", "rms_norm_eps",
    "topk_method", "routed_scaling_factor", "num_nextn_predict_layers",
}  # fmt: skip
"""Fields that the presets, made from files of training programs, do not have from the config."""
LISTED = {key: value for key, value in NEMOTRON_H.items() if "pattern" not in key}


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return from_config(config | changes, "config.json")


def blocks(*kinds: str) -> dict[str, Any]:
    return LISTED | {"layers_block_type": list(kinds), "num_hidden_layers": len(kinds)}


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("qwen35_35b_a3b", QWEN3_5_MOE),
        ("nemotron_3_nano_30b_a3b", NEMOTRON_H),
        ("nemotron_3_super_120b_a12b", NEMOTRON_3_SUPER),
    ],
)
def test_a_config_reads_as_the_preset(preset: str, config: dict[str, Any]) -> None:
    found, expected = read(config), load_model(preset)
    for field in set(msgspec.structs.asdict(found)) - BESIDE:
        assert getattr(found, field) == getattr(expected, field), field
    assert total_params(found) == total_params(expected)
    assert not [note for note in found.assumptions if note.startswith("not read")]


def test_other_fields_of_published_networks() -> None:
    model, other = read(QWEN3_NEXT), read(QWEN3_5_MOE)
    assert round(total_params(model) / 1e9) == 80
    assert (model.num_linear_layers, model.linear_attention.kind) == (36, "gated_delta")
    assert (other.num_nextn_predict_layers, other.rotary_dim) == (1, 64)
    assert (read(NEMOTRON_H).topk_method, read(NEMOTRON_H).routed_scaling_factor) == ("noaux_tc", 2.5)


def _drawn(name: str, draw: random.Random) -> dict[str, Any]:
    """Keys of a small network."""
    groups = draw.choice([1, 2, 4])
    found: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": draw.choice([1, 2]),
        "head_dim": draw.choice([8, 16]), "vocab_size": draw.randint(50, 99), "pad_token_id": None,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 20,
    }  # fmt: skip
    if name == "NemotronH":
        after = [["moe"], ["mlp"], []]
        layers = [[mixer, *draw.choice(after)] for mixer in draw.choices(["mamba", "attention"], k=5)]
        return found | {
            "layers_block_type": [*chain.from_iterable(layers), "linear_attention", "moe"],
            "mamba_num_heads": 2 * groups, "mamba_head_dim": 6, "ssm_state_size": 8, "n_groups": groups,
            "conv_kernel": draw.choice([2, 4]), "moe_shared_expert_intermediate_size": 9,
            "n_routed_experts": 8, "moe_latent_size": draw.choice([None, 16]),
        }  # fmt: skip
    if name == "Qwen3Next":
        found |= {"mlp_only_layers": [1], "decoder_sparse_step": draw.choice([1, 2])}
    return found | {
        "num_hidden_layers": 5, "full_attention_interval": draw.choice([1, 2, 4]),
        "linear_conv_kernel_dim": 2, "linear_num_key_heads": groups, "linear_num_value_heads": 2 * groups,
        "linear_key_head_dim": 4, "linear_value_head_dim": 6, "num_experts": 8,
        "shared_expert_intermediate_size": 7, "tie_word_embeddings": draw.random() < 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen3Next", "Qwen3_5Moe", "NemotronH"])
def test_parameters_are_those_that_transformers_builds(name: str) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    draw = random.Random(name)
    for _ in range(3):
        keys = _drawn(name, draw)
        made = getattr(transformers, f"{name}Config")
        config = made.sub_configs.get("text_config", made)(**keys)
        with torch.device("meta"):
            built = getattr(transformers, f"{name}ForCausalLM")(config)
        plain = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [f"{name}ForCausalLM"]}
        model = from_config(plain, "config.json")
        assert total_params(model) == sum(one.numel() for one in built.parameters()), keys


def test_blocks_are_layers() -> None:
    said = blocks("linear_attention", "full_attention", "mlp", "linear_attention", "moe")
    model = read(said)
    assert (model.num_hidden_layers, model.layers_without_ffn, model.mlp_only_layers) == (3, (0,), (1,))
    assert model.layer_types == ("linear_attention", "full_attention", "linear_attention")
    assert read(LISTED, hybrid_override_pattern="M*-ME", num_hidden_layers=5) == model
    assert read(blocks("mamba", "attention", "mlp", "mamba", "moe")) == model
    dense = read(blocks("mamba", "mlp", "attention", "mlp"), n_routed_experts=None)
    assert (dense.num_local_experts, dense.num_dense_layers, dense.intermediate_size) == (0, 2, 1856)
    assert not read(QWEN3_5_TEXT, layer_types=["full_attention"] * 40).num_linear_layers


LINEAR = ["linear_attention"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (blocks("moe", "mamba"), r"layers_block_type: 'moe' \(block 0, from 0\) is refused: it must follow"),
        (blocks("mamba", "moe", "mlp"), r"layers_block_type: 'mlp' \(block 2, from 0\) is refused: it"),
        (LISTED | {"hybrid_override_pattern": "MEE"}, r"hybrid_override_pattern: 'E' \(block 2, from 0\) is"),
        (LISTED | {"hybrid_override_pattern": "ME|M"}, r"hybrid_override_pattern: '\|' is refused: a block"),
        (LISTED | {"layers_block_type": [["moe"]]}, r"layers_block_type: \['moe'\] is refused: a block is"),
        (LISTED, "layers_block_type: missing, the field is required"),
        (NEMOTRON_H | {"num_hidden_layers": 51}, "num_hidden_layers: 51 is refused: .* has 52 blocks"),
        (NEMOTRON_H | {"moe_latent_size": -1}, "moe_latent_size: -1 must not be negative"),
        (NEMOTRON_H | {"sliding_window": 4096}, "sliding_window: 4096 is refused: its attention has no"),
        (NEMOTRON_H | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers: 1 is refused: MTP layers"),
        (NEMOTRON_H | {"tie_word_embeddings": True}, "tie_word_embeddings: True is refused: its head is"),
        (NEMOTRON_H | {"n_groups": 7}, r"num_value_heads: 64 must be a multiple .*\(from n_groups, mamba"),
        (blocks("attention", "moe"), "model.full_attention_rotary: False must be True where no layer has a"),
        (QWEN3_NEXT | {"full_attention_interval": 0}, "full_attention_interval: 0 must be at least 1"),
        (QWEN3_NEXT | {"layer_types": LINEAR * 47}, "layer_types: .* num_hidden_layers 48"),
        (QWEN3_NEXT | {"layer_types": ["sliding_attention"] * 48}, "layer_types: .* only linear_attention"),
        (QWEN3_NEXT | {"attention_bias": True}, "attention_bias: True is refused: biases on the gate"),
        (QWEN3_NEXT | {"linear_num_key_heads": None}, "linear_num_key_heads: missing, the field is required"),
        (QWEN3_5_TEXT | {"attn_output_gate": False}, "attn_output_gate: False is refused"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MopError, match=message):
        read(config)
