"""Predicted against tracked memory of MTP modules under the explicit schedule, of layers that attend within
chunks or have no rotary positions, and of what Llama 4 alone has: as test_memory_parity."""

from typing import Any

import msgspec
import pytest

from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from mopsim.spec.model import ModelSpec
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop
from tests.parity.test_memory_parity import FULL, MOP_OPTIONS, MTP, SMALL, _check, _check_stages, _split
from tests.parity.tracked import second_step
from tests.plans import changed, plan_of, split
from tests.sim.toys import machine


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("loss", ["ring", "chunked", "full"])
@pytest.mark.parametrize("modules", [1, 2])
def test_mtp_modules_under_mop(modules: int, loss: str, kind: str) -> None:
    how: dict[str, Any] = {"loss": loss, "vocab_parallel": 1 + (loss == "ring")}
    how |= {"chunk_tokens": 700 * (loss == "chunked")}
    options = MOP_OPTIONS | {"optimizer": "device", "offload_inputs": False}
    strategy = changed(mop(2, **options), vocabulary=how)
    model = msgspec.structs.replace(MTP, num_nextn_predict_layers=modules)
    _check(model, strategy, TrainSpec(seq_len=8192, global_batch=2), 0.01, kind)


def test_the_projection_of_mtp_modules_is_whole_on_every_tensor_rank() -> None:
    """Taken as split, 3 % of the peak lacked."""
    plain = {"num_local_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    model = msgspec.structs.replace(
        MTP, **plain, hidden_size=1024, num_nextn_predict_layers=2, num_hidden_layers=2,
        first_k_dense_replace=0, shared_expert_intermediate_size=0,
    )  # fmt: skip
    training = TrainSpec(seq_len=512, global_batch=2)
    _check(model, fsdp2(2, tensor_parallel=2), training, 0.01)
    strategy = split(2, tensor_parallel=2)
    _check(model, strategy, training, 0.01)
    plan = plan_of(model, strategy, training, "cuda")
    found = simulate(model, machine(memory=1000), 1, strategy, training, plan.stack)
    mine = second_step(plan, 0, MemoryTracker).memory_by_category
    for name in ("params", "grads", "optimizer"):
        assert found.memory_by_category[name] == pytest.approx(mine[name], rel=1e-4), name


CHUNKS = msgspec.structs.replace(
    SMALL, attention_chunk_size=2048, sliding_window_period=2, full_attention_rotary=False,
    num_attention_heads=32, moe_intermediate_size=16, shared_expert_intermediate_size=0,
    intermediate_size=64,
)  # fmt: skip
"""Its peak is in the backward of attention."""


LLAMA4 = msgspec.structs.replace(
    SMALL, num_hidden_layers=4, num_experts_per_tok=1, scoring_func="sigmoid", norm_topk_prob=False,
    expert_inputs_weighted=True, rope_interleave=True, qk_norm="unweighted", attention_chunk_size=2048,
    layer_types=(*["chunked_attention"] * 3, "full_attention"), full_attention_rotary=False,
    attn_temperature_tuning=True,
)  # fmt: skip
SEVERAL = msgspec.structs.replace(LLAMA4, num_experts_per_tok=4)


@pytest.mark.parametrize("model", [LLAMA4, SEVERAL], ids=["one expert", "several"])
@pytest.mark.parametrize("chunk_tokens", [0, 1024])
def test_llama4_under_mop(model: ModelSpec, chunk_tokens: int) -> None:
    strategy = mop(2, **MOP_OPTIONS | {"expert_chunk_tokens": chunk_tokens}, vocab_parallel=2)
    _check(model, strategy, TrainSpec(seq_len=8192, global_batch=2), 0.01)


@pytest.mark.parametrize("model", [LLAMA4, SEVERAL], ids=["one expert", "several"])
@pytest.mark.parametrize("recompute", [{"recompute": "none"}, FULL], ids=str)
def test_llama4_under_modules(model: ModelSpec, recompute: Any) -> None:
    training = TrainSpec(seq_len=8192, global_batch=2)
    _check(model, fsdp2(2, **recompute, expert_parallel=2), training, 0.01)
    _check(model, split(2, **recompute, expert_parallel=2), training, 0.01)
    _check(model, split(2, **recompute, tensor_parallel=2, expert_tensor_parallel=2), training, 0.01)


def test_chunks_under_mop() -> None:
    """By a GPU's kernel, which takes all chunks at once: a CPU's takes them one by one."""
    strategy = mop(2, **MOP_OPTIONS, vocab_parallel=2)
    _check(CHUNKS, strategy, TrainSpec(seq_len=8192, global_batch=2), 0.01)


@pytest.mark.parametrize("recompute", [{"recompute": "none"}, FULL], ids=str)
def test_chunks_under_modules(recompute: Any) -> None:
    _check(CHUNKS, fsdp2(2, **recompute), TrainSpec(seq_len=8192, global_batch=2), 0.01)
    _check_stages(_split(2, recompute | {"model": CHUNKS}), 0.01)
