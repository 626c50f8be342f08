"""Modules that mopsim counts hooks of are those that transformers builds."""

import pytest
from msgspec.structs import replace

from mopsim.program.hook_time import hooked
from mopsim.spec.presets import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FEW = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "vocab_size": 128}
EXPERTS = {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LAYERS = {
    "Qwen3": ("qwen3_8b", {}),
    "Qwen3Moe": ("qwen3_30b_a3b", EXPERTS),
    "DeepseekV3": ("deepseek_v3", EXPERTS | {"first_k_dense_replace": 0}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_modules_of_a_layer_are_those_of_transformers(kind: str) -> None:
    """All that a decoder layer has, in which experts are tensors of one module, once."""
    network, more = LAYERS[kind]
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=1, **FEW, **more)
    with torch.device("meta"):
        layer = getattr(transformers, f"{kind}Model")(config).layers[0]
    model = load_model(network)
    if model.num_local_experts:
        model = replace(model, first_k_dense_replace=0, total_params=None, active_params=None)
    parts = hooked(model, separate=True)
    found = {name: one.modules for name, one in parts.items() if name != "expert"}
    assert sum(found.values()) == len([*layer.named_modules()]), found
