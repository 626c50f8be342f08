"""What rows become by the recipes that they ran: layouts, graphs, hidden exchanges, 8-bit attention."""

import pytest

from mopsim.validate import recipes
from tests.sim.test_validate import row


def bridge(model: str, gpu: str, notes: str, **changes: str) -> dict[str, str]:
    return row(source="megatron-bridge-perf", model=model, gpu=gpu, notes=notes, precision="mxfp8", **changes)


@pytest.mark.parametrize(
    ("notes", "graphs"),
    [
        ("CUDA graph full_iteration:[]", ("step",)),
        ("CUDA graph transformer_engine:['attn', 'moe_router', 'mamba']; MTP", ("attention", "router")),
        ("cuda graphs: attn, moe_router, moe_preprocess.", ("attention", "router")),
        ("CUDA graph transformer_engine:mlp", ("dense_ffn",)),
        ("cuda graphs: off. INCONSISTENT", ()),
        ("CUDA graph none; eager baseline of CUDA-graph A/B", ()),
        ("NeMo 26.04", ()),
    ],
)  # fmt: skip
def test_graphs_by_the_notes(notes: str, graphs: tuple[str, ...]) -> None:
    assert recipes.graphs(bridge("llama3_8b", "b200-sxm-192g", notes)) == graphs


def test_the_last_release_replays_the_whole_step() -> None:
    said = bridge("deepseek_v3", "gb300-288g", "NeMo 26.08; config fields from recipe (exact)")
    assert recipes.graphs(said) == ("step",)
    assert recipes.hides_experts(said)
    assert recipes.deduplicates(said)
    assert recipes.eight_bit_attention(said)
    assert recipes.eight_bit_vocabulary(said)
    assert not recipes.eight_bit_attention({**said, "gpu": "gb200-186g"})
    earlier = {**said, "notes": "NeMo 26.04"}
    assert recipes.graphs(earlier) == ()
    assert not recipes.hides_experts(earlier)
    assert not recipes.deduplicates(earlier)
    assert not recipes.eight_bit_attention(earlier)
    assert recipes.graphs({**said, "source": "mine"}) == ()


def test_recompute_of_a_few_layers_is_none() -> None:
    few = bridge("llama3_8b", "h100-sxm-80g", "recompute only in part of the layers: full(block,5 layers)")
    assert recipes.recomputed(few, "full") == "none"
    assert recipes.recomputed({**few, "pp": "4"}, "full") == "full"
    assert recipes.recomputed(row(), "full") == "full"


def test_layouts_hold_the_whole_network() -> None:
    for parts, layers in recipes.DEEPSEEK_LAYERS.items():
        assert len(layers) == parts
        assert sum(layers) == 61
    assert recipes.layers(row(model="deepseek_v3", num_layers=""), 16)[-1] == 1
    assert recipes.layers(row(model="deepseek_v3", num_layers="4"), 8) == ()
    assert recipes.layers(row(num_layers="80"), 8) == ()


@pytest.mark.parametrize(
    ("source", "dispatcher", "gpu", "share"),
    [
        ("megatron-bridge-cards", "hybridep", "h100-sxm-80g", 32 / 132),
        ("megatron-bridge-perf", "hybridep", "b200-sxm-192g", 32 / 148),
        ("megatron-bridge-perf", "deepep", "h100-sxm-80g", 0.15),
        ("megatron-bridge-perf", "alltoall", "h100-sxm-80g", 0.15),
        ("halo-bench", "hybridep", "b300-sxm-288g", 0.15),
    ],
)
def test_hybrid_exchanges_take_the_recipes_share(
    source: str, dispatcher: str, gpu: str, share: float
) -> None:
    one = {"source": source, "dispatcher": dispatcher, "gpu": gpu, "model": "qwen3_30b_a3b"}
    assert recipes.hybrid(one | {"precision": "bf16"}) == (dispatcher == "hybridep")
    assert recipes.communication_share(one | {"precision": "bf16"}, 0.15) == pytest.approx(share)
