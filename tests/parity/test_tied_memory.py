"""Predicted against tracked memory of networks whose embedding and head share a weight, under the explicit
schedule: as test_memory_parity."""

from typing import Any

import pytest

from mopsim.spec.model import ModelSpec
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop, zero_offload
from tests.parity.test_gpt_memory import GPT, TIED
from tests.parity.test_memory_parity import _check

EXPERTS: dict[str, Any] = {"expert_parallel": 2, "expert_chunk_tokens": 2048}
WAYS: dict[str, dict[str, Any]] = {
    "ring": {"vocab_parallel": 2},
    "rows go around": {"vocab_parallel": 2, "seq_len": 65536 // 2 + 1024},
    "on the device": {"vocab_parallel": 2, "optimizer": "device", "offload_inputs": False},
    "on the host": {"vocab_parallel": 2, "optimizer": "host"},
    "beside the next forward": {"vocab_parallel": 2, "optimizer_overlap": True},
    "under the backward": {"vocab_parallel": 2, "optimizer_overlap": "backward"},
    "fp32": {"vocab_parallel": 2, "dtype": "float32"},
}


def _played(model: ModelSpec, strategy: Strategy, seq_len: int, kind: str = "cuda") -> None:
    clip = 0.0 if strategy.optimizer.overlap == "backward" else 1.0
    training = TrainSpec(seq_len=seq_len, global_batch=2 * strategy.data_groups, clip_norm=clip)
    _check(model, strategy, training, 0.003, kind)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", [TIED, GPT], ids=["rotary", "positions"])
@pytest.mark.parametrize("way", WAYS)
def test_one_weight_under_mop(way: str, model: ModelSpec, world: int) -> None:
    options = dict(WAYS[way])
    seq_len = options.pop("seq_len", 2048)
    _played(model, mop(world, **EXPERTS, **options), min(seq_len, model.learned_positions or seq_len))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("model", [TIED, GPT], ids=["rotary", "positions"])
def test_one_weight_under_zero_offload(model: ModelSpec, loss: Any, world: int) -> None:
    _played(model, zero_offload(world, expert_parallel=2, loss=loss), 2048)
