"""Networks that a field describes which no part of them has."""

from typing import Any

import pytest

from mopsim.common.errors import MopError
from mopsim.common.io import convert, to_plain
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model

TURNS = "elements of a head, which must be an even number"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("nemotron_8b", {"swiglu_limit": 7.0}, r"swiglu_limit: 7\.0 must be 0 where ffn_matrices is 2"),
    (
        "deepseek_v3",
        {"sliding_window": 128, "sliding_window_period": 2, "full_attention_rotary": False},
        "full_attention_rotary: False must be True for mla",
    ),
    (
        "gpt_h1024_l12",
        {"rope_theta": 5e5},
        r"rope_theta: 500000\.0 must be 10000\.0, the default",
    ),
    (
        "gpt_h1024_l12",
        {"partial_rotary_factor": 0.5},
        r"partial_rotary_factor: 0\.5 must be 1\.0, .* rotated",
    ),
    ("gpt_h1024_l12", {"rope_interleave": True}, "rope_interleave: True must be False, the default"),
    (
        "gpt_h1024_l12",
        {"sliding_window": 128, "full_attention_rotary": False},
        "full_attention_rotary: False must be True, the default",
    ),
    (
        "gpt_h1024_l12",
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 4096}},
        r"rope_scaling\.rope_type: 'yarn' must be 'default', the default, beside learned",
    ),
    ("gpt_h1024_l12", {"qk_norm": "unweighted"}, "qk_norm: 'unweighted' is of rotated queries and keys"),
    (
        "llama4_maverick",
        {"attn_temperature_tuning": False, "floor_scale": 4},
        "floor_scale: 4 must be 8192, the default, where attn_temperature_tuning is False",
    ),
    ("mixtral_8x7b", {"attn_scale": 0.2}, r"attn_scale: 0\.2 must be 0\.1, the default"),
    (
        "mixtral_8x7b",
        {"norm_bias": False},
        "norm_bias: False must be True, .* where norm is 'rmsnorm'",
    ),
    ("mixtral_8x7b", {"ffn_activation": "relu2"}, "ffn_activation: 'relu2' must be 'gelu', the default"),
    (
        "mixtral_8x7b",
        {"partial_rotary_factor": 1e-300},
        rf"partial_rotary_factor: 1e-300 turns 1\.28e-298 of the 128 {TURNS}",
    ),
    (
        "mixtral_8x7b",
        {"partial_rotary_factor": 0.3},
        rf"partial_rotary_factor: 0\.3 turns 38\.4 of the 128 {TURNS}",
    ),
    (
        "mixtral_8x7b",
        {"partial_rotary_factor": 7 / 128},
        f"partial_rotary_factor: 0.0546875 turns 7 of the 128 {TURNS}",
    ),
    ("mixtral_8x7b", {"head_dim": 7}, "head_dim: 7 must be even: rotary positions turn pairs of elements"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_a_field_of_what_a_network_has_not(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MopError, match=rf"model\.{message}"):
        convert(to_plain(load_model(name)) | changes, ModelSpec, "model", "model")


@pytest.mark.parametrize(("size", "part"), [(80, 0.4), (96, 0.25), (128, 0.75), (2, 1.0)])
def test_a_part_of_a_head_that_networks_turn(size: int, part: float) -> None:
    changes = {"head_dim": size, "partial_rotary_factor": part}
    model = convert(to_plain(load_model("mixtral_8x7b")) | changes, ModelSpec, "model", "model")
    assert model.rotary_dim == size * part


def test_learned_positions_turn_no_pairs() -> None:
    changes = {"head_dim": 7, "norm": "layernorm", "norm_bias": False}
    convert(to_plain(load_model("gpt_h1024_l12")) | changes, ModelSpec, "model", "model")
