"""Memory parity of every kind of attention in a network that has little else."""

from typing import Any

import msgspec
import pytest

from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.parity.test_memory_parity import BLOCKS
from tests.parity.tracked import halved, second_step
from tests.plans import plan_of
from tests.sim.toys import machine

DENSE: dict[str, Any] = {
    "num_local_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "intermediate_size": 64,
    "first_k_dense_replace": 0, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "vocab_size": 128,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 64, "sliding_window_period": 2}
WIDE = {"num_attention_heads": 32}


def _kind(name: str, **changes: Any) -> ModelSpec:
    return msgspec.structs.replace(BLOCKS[name], **DENSE | changes)


KINDS = {
    "heads": _kind("heads"),
    "shared heads": _kind("shared heads", qk_norm="none"),
    "norms of heads": _kind("shared heads", qk_norm="head"),
    "norms of all heads": _kind("shared heads", qk_norm="full"),
    "biases": _kind("shared heads", attention_bias="qkv", **WIDE),
    "neighbours": _kind("shared heads", rope_interleave=True),
    "part of a head": _kind("shared heads", partial_rotary_factor=0.5, attention_bias="qkv", **WIDE),
    "neighbours in part": _kind("shared heads", partial_rotary_factor=0.5, rope_interleave=True),
    "windows": _kind("shared heads", **WINDOW),
    "windows alone": _kind("heads", sliding_window=64),
    "windows and sinks": _kind("shared heads", attention_bias="qkvo", attention_sinks=True, **WINDOW | WIDE),
    "learned positions": _kind("heads", learned_positions=8192, attention_bias="qkv", **WIDE),
    "learned positions, norms": _kind("shared heads", learned_positions=8192, qk_norm="full"),
    "latents": _kind("latents"),
    "latents of keys": _kind("latents", q_lora_rank=0),
    "narrow values": _kind("narrow values"),
}
RUNTIMES = {
    "flat": lambda dtype: mop(1, dtype=dtype),
    "flat, ulysses": lambda dtype: mop(2, context_parallel=2, dtype=dtype),
    "modules": lambda dtype: fsdp2(1, dtype=dtype),
}
EXCHANGED = ("norms of heads", "learned positions", "windows and sinks", "narrow values")
CASES = [
    (name, runtime, ("bfloat16", "float32")[(kind + way) % 2], ("cuda", "cpu")[(kind // 2 + way) % 2])
    for kind, name in enumerate(KINDS)
    for way, runtime in enumerate(RUNTIMES)
    if runtime != "flat, ulysses" or name in EXCHANGED
]
"""Any values of two axes go together, but of ranks that exchange heads and what is within a head; of more, in
test_drawn_memory."""


@pytest.mark.parametrize(("name", "runtime", "dtype", "kind"), CASES)
def test_attention_of_every_kind(name: str, runtime: str, dtype: str, kind: str) -> None:
    """Flat, projections that autograd runs again were up to 49 % low. With biases heads are so wide that
    their part has the peak: three gradients of what the products read, of which a tracker sees one too many
    (see test_halves_at_a_published_width), are small beside it."""
    strategy: Strategy = RUNTIMES[runtime](dtype)
    plan = plan_of(KINDS[name], strategy, TrainSpec(seq_len=4096, global_batch=1), kind)
    tracked = second_step(plan, strategy.world_size - 1, MemoryTracker)
    result = simulate(plan.model, machine(memory=1000), 1, strategy, plan.training, plan.stack)
    assert tracked.peak_component == "attention" or kind == "cpu" or dtype == "float32"
    assert result.peak_memory == pytest.approx(tracked.peak_memory, rel=0.01)


WIDTH = ModelSpec(
    name="dense", hidden_size=4096, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=32,
    head_dim=128, vocab_size=32_000, intermediate_size=8192, ffn_matrices=2,
)  # fmt: skip
COMPOSED: dict[str, dict[str, Any]] = {
    "GPT": {"norm": "layernorm", "attention_bias": "qkvo", "ffn_bias": True, "learned_positions": 8192},
    "biases": {"attention_bias": "qkv"},
    "shared heads": {"attention_bias": "qkv", "num_key_value_heads": 8},
    "norms": {"qk_norm": "full"},
    "norms after the rotation": {"qk_norm": "unweighted"},
    "neighbours": {"rope_interleave": True},
    "latents": {
        "attention": "mla", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 192,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), halved(COMPOSED, ("bfloat16", "float32")))
def test_projections_that_run_again_at_a_published_width(name: str, dtype: Any) -> None:
    """Gradients of their weights, 32 MiB each in bf16, were all held to the end of the backward, and one of a
    product's beside that of its input was not simulated: peaks were up to 8 % low. Norms after the rotation
    were simulated before it: 4 % high."""
    model = msgspec.structs.replace(WIDTH, **COMPOSED[name])
    strategy = mop(8, loss_chunk_tokens=2048, vocab_parallel=8, expert_chunk_tokens=0, dtype=dtype)
    plan = plan_of(model, strategy, TrainSpec(seq_len=8192, global_batch=8), "cuda")
    tracked = second_step(plan, 7, MemoryTracker)
    result = simulate(model, machine(memory=1000), 1, strategy, plan.training, plan.stack)
    assert result.peak_memory == pytest.approx(tracked.peak_memory, rel=0.002)


CHUNKS = {"attention_chunk_size": 2048, "head_dim": 256}
SPANS: dict[str, tuple[dict[str, Any], Any]] = {
    "documents": ({}, "document"),
    "documents, shared heads": ({"num_key_value_heads": 8, "head_dim": 256}, "document"),
    "chunks": (CHUNKS, "causal"),
    "chunks of documents": ({"num_key_value_heads": 8, **CHUNKS}, "document"),
    "windows of documents": ({"sliding_window": 1000, "head_dim": 256}, "document"),
    "norms after the rotation": ({"qk_norm": "unweighted"}, "causal"),
    "norms of shared heads after the rotation": (
        {"qk_norm": "unweighted", "num_key_value_heads": 8},
        "causal",
    ),
}


@pytest.mark.parametrize(("name", "dtype"), halved(SPANS, ("bfloat16", "float32")))
def test_a_cpu_attends_span_by_span(name: str, dtype: Any) -> None:
    """Beside the whole results are a span's: peaks of documents were 2.6 % low, in fp32 6. Autograd keeps no
    normed values of a norm without a weight: 4 and 3 % high."""
    fields, mask = SPANS[name]
    strategy = mop(8, loss_chunk_tokens=2048, vocab_parallel=8, expert_chunk_tokens=0, dtype=dtype)
    training = TrainSpec(seq_len=8192, global_batch=8, attention_mask=mask)
    plan = plan_of(msgspec.structs.replace(WIDTH, **fields), strategy, training, "cpu")
    tracked = second_step(plan, 7, MemoryTracker)
    result = simulate(plan.model, machine(memory=1000), 1, strategy, training, plan.stack)
    assert result.peak_memory == pytest.approx(tracked.peak_memory, rel=0.002)
