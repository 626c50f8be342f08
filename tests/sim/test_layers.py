"""Shapes, counts and FLOPs by hand; tapes conserve memory."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.graph import active_params, flops_per_token, parameters, total_params
from mopsim.graph.attention import attention
from mopsim.graph.experts import experts, router
from mopsim.graph.ffn import ffn
from mopsim.graph.liveness import NOTHING, backward, everything, forward
from mopsim.graph.rewrites.recompute import plan
from mopsim.graph.shapes import Shapes, causal_pairs
from mopsim.graph.tape import Kernel, Step, Tape, Value
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from tests.sim.toys import small


def test_one_layer_by_hand() -> None:
    model = small(num_hidden_layers=1, first_k_dense_replace=0, shared_expert_intermediate_size=0)
    attention_params = 64 * 128 * 2 + 64 * 64 * 2
    expected = 2 * 256 * 64 + attention_params + 3 * 64 + 8 * 64 + 8 * 3 * 64 * 48
    assert total_params(model) == expected
    assert active_params(model) == expected - 6 * 3 * 64 * 48
    flops = flops_per_token(model, 16)
    assert flops["attention"] == 2 * attention_params
    assert flops["attention_core"] == pytest.approx(2 * 8 * 32 * 17 / 2)
    assert flops["experts"] == 2 * 2 * 3 * 64 * 48
    assert flops["router"] == 2 * 64 * 8
    assert flops["vocabulary"] == 2 * 64 * 256


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b", "mop_1t"])
def test_published_totals(name: str) -> None:
    model = load_model(name)
    assert model.total_params is not None
    assert total_params(model) == pytest.approx(model.total_params, rel=0.03)


def test_tied_biased_two_matrix_and_mtp_parameters() -> None:
    model = small(
        tie_word_embeddings=True,
        attention_bias="qkv",
        ffn_matrices=2,
        norm="layernorm",
        num_nextn_predict_layers=1,
    )
    names = parameters(model)
    assert "head.weight" not in names
    assert names["layers.0.attention.q_proj.bias"] == (128,)
    assert "layers.0.ffn.gate_proj.weight" not in names
    assert names["layers.0.ffn_norm.bias"] == (64,)
    assert names["mtp.0.projection.weight"] == (64, 128)
    assert names["mtp.0.layer.moe.experts.up_proj"] == (8, 64, 48)


def test_latent_attention_flops_are_its_matmuls() -> None:
    model = small(
        attention="mla",
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        head_dim=12,
        num_key_value_heads=8,
    )
    weights = sum(
        shape[0] * shape[1]
        for name, shape in parameters(model).items()
        if name.startswith("layers.0.attention.") and len(shape) == 2
    )
    assert flops_per_token(model, 8)["attention"] == pytest.approx(3 * 2 * weights)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 600))
def test_causal_pairs_count_the_mask(seq: int, window: int) -> None:
    counted = sum(min(i + 1, window or seq) for i in range(seq))
    assert causal_pairs(seq, window) == counted


def _tapes(model: ModelSpec, tokens: int, degree: int) -> list[Tape]:
    return [
        attention(model, Shapes(tokens, tokens * degree, degree), 0),
        ffn(model, 96, "dense_ffn", Shapes(tokens, tokens)),
        router(model, tokens, 2, 4), experts(model, (tokens, 0, tokens), 2),
    ]  # fmt: skip


def _highest(memory: list[Step]) -> int:
    return max(accumulate(size for _, size in memory))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]), st.sampled_from(["none", "head", "full"]))
def test_tapes_leave_what_they_say(tokens: int, degree: int, qk_norm: str) -> None:
    """Forward leaves the outputs (and saved values with a graph); backward frees them and leaves input
    gradients."""
    for tape in _tapes(small(qk_norm=qk_norm), tokens, degree):
        values = tape.values
        outputs = sum(values[name].bytes for name in tape.outputs)
        consumed = sum(values[name].bytes for name in tape.consumes)
        saved = sum(values[name].bytes for name in tape.kept)
        plain = [step for played in forward(tape, NOTHING) for step in played.memory]
        graph = [step for played in forward(tape, everything(tape)) for step in played.memory]
        assert sum(size for _, size in plain) == outputs - consumed
        assert sum(size for _, size in graph) == outputs - consumed + saved
        assert _highest(graph) >= _highest(plain)
        back = [step for played in backward(tape, everything(tape)) for step in played.memory]
        grads = sum(value.bytes for value in tape.inputs if value.grad)
        outputs = sum(values[name].bytes for name in tape.outputs if values[name].grad)
        assert sum(size for _, size in back) == grads - outputs - saved


def test_what_is_recomputed_dies_with_those_that_keep_it() -> None:
    """Not with whatever reads it first, as what the recomputation begins from does."""
    x, u, z = (Value(name, size) for name, size in zip("xuz", (1, 16, 4), strict=True))
    kernels = (
        Kernel("norm", "memory_bound", "other", ("x",), (u,), ("x",)),
        Kernel("look", "memory_bound", "other", ("u",), ()),
        Kernel("product", "memory_bound", "other", ("u",), (z,), ("u",)),
    )
    tape = Tape((x,), kernels, ("z",))
    played = backward(tape, plan(tape, "full", ()))
    freed = [one.kernel.name for one in played if one.backward and ("activations", -16) in one.memory]
    assert freed == ["product", "norm"]  # u, then its gradient
