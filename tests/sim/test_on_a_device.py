"""Layers of Transformer Engine take the host more on a device than their tables say, torch's do not."""

import pytest

from mopsim.graph import host_costs
from mopsim.program import host_time, lower
from mopsim.strategies import fsdp2, megatron
from tests.sim.test_modules import MODEL, linears, training

PHASES = ("forward", "backward")


def test_a_layer_of_transformer_engine_takes_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, factor = training(4096, 32), host_costs.ON_A_DEVICE["transformer_engine"]
    ours = linears(lower(MODEL, megatron(8, expert_parallel=8), jobs, 8, compose=False), 5)
    torchs = linears(lower(MODEL, fsdp2(8, expert_parallel=8), jobs, 8, compose=False), 5)
    monkeypatch.setattr(host_time, "ON_A_DEVICE", {})
    alone = linears(lower(MODEL, megatron(8, expert_parallel=8), jobs, 8, compose=False), 5)
    assert factor > 1.0
    for phase in PHASES:
        assert ours[phase, "attention"] == pytest.approx(factor * alone[phase, "attention"])
    assert ours["forward", "experts"] > alone["forward", "experts"]
    assert torchs == linears(lower(MODEL, fsdp2(8, expert_parallel=8), jobs, 8, compose=False), 5)
