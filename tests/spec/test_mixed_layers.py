"""Which layers a config says are dense, and which have a window; totals of networks that no preset has."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from mopsim.common.errors import MopError
from mopsim.graph.flops import flops_per_token
from mopsim.graph.shapes import causal_pairs
from mopsim.spec.capability import model_refusals
from mopsim.spec.presets import load_model
from mopsim.spec.tensors import tensors, total_params
from tests.spec import test_huggingface as told


@pytest.mark.parametrize(
    ("config", "total"), [(told.GLM4_MOE, 355e9), (told.DOTS1, 142e9), (told.ERNIE, 21e9)]
)
def test_published_totals(config: dict[str, Any], total: float, tmp_path: Path) -> None:
    """docs/source/en/model_doc of transformers; dots.llm1: arXiv 2506.05767."""
    assert total_params(load_model(told.write(tmp_path, config))) == pytest.approx(total, rel=0.04)


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        (told.QWEN3_MOE | {"decoder_sparse_step": 2}, range(0, 48, 2)),
        (told.QWEN3_MOE | {"mlp_only_layers": [0, 1]}, (0, 1)),
        (told.QWEN3_MOE | {"mlp_only_layers": [47, 3]}, (3, 47)),
        (
            told.QWEN3_MOE | {"mlp_only_layers": [1], "decoder_sparse_step": 4},
            {*range(48)} - {*range(3, 48, 4)},
        ),
        (told.DEEPSEEK_V3 | {"moe_layer_freq": 2}, (0, 1, 2, *range(3, 61, 2))),
        (told.DEEPSEEK_V3 | {"moe_layer_freq": [1, 0] * 30 + [1]}, (0, 1, 2, *range(3, 61, 2))),
        (told.ERNIE | {"moe_layer_interval": 2, "moe_layer_end_index": 5}, {*range(28)} - {1, 3, 5}),
        (told.LLAMA4, range(0, 48, 2)),
        (told.TEXT | {"moe_layers": [5, 7]}, {*range(48)} - {5, 7}),
        (told.ERNIE | {"moe_layer_start_index": 3, "moe_layer_end_index": -1}, (0, 1, 2)),
    ],
)
def test_dense_layers_anywhere(config: dict[str, Any], dense: Collection[int], tmp_path: Path) -> None:
    model = load_model(told.write(tmp_path, {"intermediate_size": 6144} | config))
    layers = range(model.num_hidden_layers)
    assert [layer for layer in layers if not model.is_moe_layer(layer)] == sorted(dense)
    assert (model.num_dense_layers, len(model.moe_layers)) == (len(dense), model.num_moe_layers)
    found = [tensor.layer for tensor in tensors(model) if tensor.name.endswith("ffn.down_proj.weight")]
    assert found == sorted(dense)


WINDOW = {"use_sliding_window": True, "sliding_window": 4096}
MIXED = ["full_attention", *["sliding_attention"] * 5] * 8


@pytest.mark.parametrize(
    ("config", "windowed"),
    [
        (told.QWEN3 | WINDOW | {"max_window_layers": 30}, range(30, 36)),
        (told.QWEN2 | WINDOW | {"num_hidden_layers": 30}, (28, 29)),
        (told.QWEN2_MOE | WINDOW | {"layer_types": MIXED[:28]}, [at for at in range(28) if at % 6]),
        (told.QWEN3_MOE | WINDOW, range(48)),
        (told.GPT_OSS | {"layer_types": MIXED[:24]}, [at for at in range(24) if at % 6]),
        (told.GPT_OSS | {"layer_types": ["full_attention"] * 24}, ()),
        (told.LLAMA4, [at for at in range(48) if at % 4 < 3]),
        (told.TEXT | {"no_rope_layers": [1, 0] * 24}, range(0, 48, 2)),
        (told.DOTS1 | {"sliding_window": 4096, "max_window_layers": 60}, (60, 61)),
        (told.without("sliding_window", told.DOTS1 | {"max_window_layers": 60}), (60, 61)),
        (told.without("sliding_window", told.QWEN3 | WINDOW | {"max_window_layers": 30}), range(30, 36)),
        (told.without("sliding_window", told.QWEN3_MOE | WINDOW), range(48)),
        (told.without("sliding_window", told.MISTRAL), range(32)),
        (told.QWEN3_MOE | WINDOW | {"sliding_window": None}, ()),
    ],
)
def test_windows_anywhere(config: dict[str, Any], windowed: Collection[int], tmp_path: Path) -> None:
    model = load_model(told.write(tmp_path, config))
    layers = range(model.num_hidden_layers)
    assert [layer for layer in layers if model.window(layer)] == list(windowed)


def test_chunks_are_attended_each_by_itself(tmp_path: Path) -> None:
    """As many pairs as sequences of a chunk have."""
    model = load_model(told.write(tmp_path, told.LLAMA4))
    assert causal_pairs(2 * 8192 + 5, 8192, chunked=True) == 2 * causal_pairs(8192) + causal_pairs(5)
    short, long = (flops_per_token(model, seq_len)["attention_core"] for seq_len in (8192, 32768))
    assert long / short == pytest.approx((36 + 12 * 32769 / 8193) / 48)
    assert [layer for layer in range(8) if not model.rotates(layer)] == [3, 7]
    assert [layer for layer in range(8) if model.tempers(layer)] == [3, 7]
    assert not list(model_refusals(model))


def test_part_of_a_head_is_rotated(tmp_path: Path) -> None:
    """As transformers 5 writes it, it stands with the other rotary parameters."""
    nested = {
        key: value
        for key, value in told.GLM4_MOE.items()
        if key not in ("partial_rotary_factor", "rope_theta")
    }
    inner = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert load_model(told.write(tmp_path, nested | {"rope_parameters": inner})).rotary_dim == 32
    assert load_model(told.write(tmp_path, nested)).rotary_dim == 64
    with pytest.raises(MopError, match=r"partial_rotary_factor: 0.25 is refused for LlamaForCausalLM"):
        load_model(told.write(tmp_path, told.LLAMA | {"rope_parameters": inner}))
    empty = told.LLAMA | {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert load_model(told.write(tmp_path, empty)).rope_theta == 1e6
