"""What transformers writes of a network that both know is read, or known to change nothing.

What a config does not say means what transformers takes it for.
"""

import json
import re
from contextlib import suppress
from copy import deepcopy
from typing import Any

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.spec.architectures import ARCHITECTURES
from mopsim.spec.config_reader import UNREAD
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import ModelSpec
from tests.spec import hybrid_configs as others
from tests.spec import test_huggingface as told
from tests.together import together

transformers = pytest.importorskip("transformers")
StrictDataclassError = pytest.importorskip("huggingface_hub.errors").StrictDataclassError

Config = dict[str, Any]
PUBLISHED: dict[str, Config] = {
    one["architectures"][0]: one
    for one in (
        *told.CASES.values(),
        told.QWEN2,
        told.MISTRAL,
        told.DOTS1,
        told.ERNIE,
        told.GPT2,
        others.QWEN3_NEXT,
        others.NEMOTRON_H,
        others.GLM_5_2,
        others.DEEPSEEK_V3_2,
        others.MINIMAX_M2,
        others.GLM_4_7_FLASH,
        others.SOLAR_OPEN,
    )
} | {"Llama4ForCausalLM": told.TEXT, "Qwen3_5MoeForCausalLM": others.QWEN3_5_TEXT}  # type: ignore[assignment]
SIZES: Config = {"num_attention_heads": 640, "hidden_size": 40960, "num_hidden_layers": 9}
"""Of no class, and such that every class's num_key_value_heads divides the heads."""
NEEDED: Config = {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1}
"""What is null in some classes, with which there is no network."""
LONGER: Config = {"max_position_embeddings": 16384, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
WINDOWS: Config = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 4}
GROUPS: Config = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
REFUSED = {
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_k",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts",
    "n_group", "topk_group", "use_sliding_window", "layer_types", "head_dim", "n_embd", "n_layer", "n_head",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "n_groups", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "hybrid_override_pattern",
    "layers_block_type", "moe_shared_expert_intermediate_size", "index_topk_freq", "index_skip_topk_offset",
}  # fmt: skip
"""Without which a config of some architecture is refused."""


def whole(architecture: str, config: Config) -> Config:
    """Every key, as transformers has it once it has read the config; MTP layers as in its training, in which
    there are those that a config says."""
    made = getattr(transformers, re.sub("(ForCausalLM|LMHeadModel)$", "Config", architecture))
    made = made.sub_configs.get("text_config", made)
    text = made(**deepcopy(config)).to_json_string(use_diff=False)
    found: Config = json.loads(
        text, object_hook=lambda one: float(one["__float__"]) if "__float__" in one else one
    )
    found["architectures"] = [architecture]
    if "num_nextn_predict_layers" not in config:
        found.pop("num_nextn_predict_layers", None)
    return found


def usual(architecture: str, **config: Any) -> Config:
    """The class's defaults, but the config's and the least that a network needs."""
    found = whole(architecture, SIZES | config)
    return {key: NEEDED.get(key) if value is None else value for key, value in found.items()}


def read(config: Config) -> ModelSpec | None:
    """The network without its assumptions; None where it is refused in one line."""
    try:
        return msgspec.structs.replace(from_config(config, "config.json"), assumptions=())
    except MopError as refused:
        if "\n" in str(refused):
            raise
        return None


def bases(architecture: str) -> list[Config]:
    published = PUBLISHED[architecture]
    sure, longer = [usual(architecture), published], published | LONGER
    assert all(map(read, sure))
    meant = ARCHITECTURES[architecture]
    rotary = not meant.reads.get("learned_positions") and meant.fixed.get("full_attention_rotary", True)
    assert bool(read(longer)) == rotary
    more = [longer, usual(architecture, **WINDOWS), published | WINDOWS, usual(architecture, **GROUPS)]
    return [*sure, *filter(read, more)]


@together(ARCHITECTURES)
def test_every_key_of_transformers_is_known(architecture: str) -> None:
    model = from_config(usual(architecture), "config.json")
    assert not [note for note in model.assumptions if note.startswith(UNREAD)]


@together(ARCHITECTURES)
def test_what_is_absent_is_what_transformers_takes(architecture: str) -> None:
    """Or is refused."""
    for base in bases(architecture):
        for key in base:
            less = {name: value for name, value in base.items() if name != key}
            found = read(less)
            assert found == read(whole(architecture, less)) if found else key in REFUSED, key


@together(ARCHITECTURES)
def test_a_null_is_what_transformers_takes(architecture: str) -> None:
    """Or is refused. Most nulls transformers refuses."""
    for base in bases(architecture):
        for key in base:
            nulled = base | {key: None}
            with suppress(StrictDataclassError):
                found = read(nulled)
                assert found is None or found == read(whole(architecture, nulled)), key
