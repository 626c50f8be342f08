"""config.json of networks of 2026: as transformers builds them, as the presets made by hand."""

import json
from typing import Any

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.spec.huggingface import from_config
from mopsim.spec.presets import load_model
from mopsim.spec.tensors import active_params, total_params
from mopsim.validate.models import model_rules
from tests.spec.hybrid_configs import DEEPSEEK_V3_2, GLM_4_7_FLASH, GLM_5_2, MINIMAX_M2, SOLAR_OPEN

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 9,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 1, "topk_group": 1,
}  # fmt: skip
INDEXER = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}


@pytest.mark.parametrize(("name", "config"), [("glm5_2", GLM_5_2), ("deepseek_v3_2", DEEPSEEK_V3_2)])
def test_a_config_reads_as_the_preset(name: str, config: dict[str, Any]) -> None:
    read, preset = from_config(config, "config.json"), load_model(name)
    for field in set(preset.__struct_fields__) - {
        "name",
        "source",
        "assumptions",
        "total_params",
        "active_params",
    }:
        assert getattr(read, field) == getattr(preset, field), field
    assert not read.assumptions


def test_rows_of_a_table_have_the_indexer_of_the_preset() -> None:
    (rule,) = [one for one in model_rules() if one.id == "indexer-of-glm-5-2"]
    said = msgspec.to_builtins(load_model("glm5_2").sparse_attention)
    assert said == said | rule.set["model.sparse_attention"]


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(MINIMAX_M2, 229e9, 11e9), (GLM_4_7_FLASH, 30e9, 3.9e9), (SOLAR_OPEN, 102.6e9, 12e9)],
)
def test_published_totals(config: dict[str, Any], total: float, active: float) -> None:
    """Of MiniMax-M2, GLM-4.7-Flash and Solar-Open-100B."""
    model = from_config(config, "config.json")
    assert total_params(model) == pytest.approx(total, rel=5e-3)
    assert active_params(model) == pytest.approx(active, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("deepseek_v32", LATENT | INDEXER),
        ("glm_moe_dsa", LATENT | INDEXER),
        ("glm_moe_dsa", LATENT | INDEXER | {"index_topk_freq": 4, "index_skip_topk_offset": 3}),
        ("glm4_moe_lite", LATENT),
        ("minimax_m2", {"num_local_experts": 8, "head_dim": 16, "rotary_dim": 8}),
        ("solar_open", {"n_routed_experts": 8, "moe_intermediate_size": 32, "head_dim": 16}),
    ],
)
def test_it_has_the_parameters_that_transformers_makes(kind: str, more: dict[str, int]) -> None:
    """But for those of indexers that layers without one have there, and never use."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(kind, **SMALL, **more, **special)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(made).__name__]
    model = from_config(json.loads(config.to_json_string()), "config.json")
    assert not model.assumptions
    every = [0, 1, 2, 6] if "index_topk_freq" in more else list(range(9))
    assert [layer for layer in range(9) if model.chooses(layer)] == (every if "index_topk" in more else [])
    unused = {f"model.layers.{layer}.self_attn.indexer." for layer in range(9) if not model.chooses(layer)}
    used = [one for name, one in made.named_parameters() if not name.startswith(tuple(unused))]
    assert total_params(model) == sum(one.numel() for one in used)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"indexer_types": ["full"] * 78}, "indexer_types: .* is refused: only what index_topk_freq"),
        ({"index_topk_pattern": "FS" * 39}, "index_topk_pattern: .* only a period of layers"),
        *(
            (
                {"index_topk_freq": every, "index_skip_topk_offset": 79, "indexer_types": None},
                "index_skip_topk_offset: 79 is more than num_hidden_layers 78",
            )
            for every in (1, 4)
        ),
        ({"layer_types": ["full_attention"] * 78}, "layer_types: .* is refused: only indexed_attention or"),
        ({"layer_types": ["indexed_attention"]}, "layer_types: .* one for each of num_hidden_layers 78"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types: .* must be dense or sparse for each"),
        ({"index_topk": 0}, "index_topk: 0 must be at least 1"),
        ({"attention_bias": True}, "attention_bias: True is refused: biases on latent attention"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MopError, match=says):
        from_config(GLM_5_2 | changes, "config.json")


def test_earlier_networks_of_a_family_are_refused() -> None:
    with pytest.raises(MopError, match="attn_type_list: layers of linear attention cannot be expressed here"):
        from_config(MINIMAX_M2 | {"attn_type_list": [0, 1] * 31}, "config.json")
    with pytest.raises(MopError, match="only norms over all heads can be expressed here"):
        from_config(MINIMAX_M2 | {"qk_norm_type": "per_head"}, "config.json")
    with pytest.raises(MopError, match="rotary_dim: 256 is more than the 128 elements of a head"):
        from_config(MINIMAX_M2 | {"rotary_dim": 256}, "config.json")
