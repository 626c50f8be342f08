"""Layers of Transformer Engine take the host more on a device than their tables say, torch's do not."""

import pytest

from mopsim.graph import host_costs
from mopsim.program import lower
from mopsim.strategies import fsdp2, megatron
from tests.sim.test_modules import MODEL, linears, training
from tests.software import changed

PHASES = ("forward", "backward")


def test_a_layer_of_transformer_engine_takes_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, factor = training(4096, 32), host_costs.ON_A_DEVICE["transformer_engine"]
    ours = linears(lower(MODEL, megatron(8, expert_parallel=8), jobs, 8, compose=False), 5)
    torchs = linears(lower(MODEL, fsdp2(8, expert_parallel=8), jobs, 8, compose=False), 5)
    monkeypatch.setattr(host_costs, "ON_A_DEVICE", {})
    alone = linears(lower(MODEL, megatron(8, expert_parallel=8), jobs, 8, compose=False), 5)
    assert factor > 1.0
    for phase in PHASES:
        assert ours[phase, "attention"] == pytest.approx(factor * alone[phase, "attention"])
    assert ours["forward", "experts"] > alone["forward", "experts"]
    assert torchs == linears(lower(MODEL, fsdp2(8, expert_parallel=8), jobs, 8, compose=False), 5)


def test_each_product_of_experts_that_the_host_starts_takes_more() -> None:
    """Two forward and four backward for each of 16 local experts; none where one kernel has them all."""
    jobs, cost = training(4096, 32), 0.6
    for kind, started in (("looped", 16), ("grouped", 0)):
        found = []
        for each in (0.0, cost):
            stack = changed("megatron-core", kernels={"expert_products": kind}, host={"products": each})
            strategy = megatron(8, expert_parallel=8)
            found.append(linears(lower(MODEL, strategy, jobs, 8, stack, compose=False), 5))
        for phase, products in (("forward", 2), ("backward", 4)):
            more = found[1][phase, "experts"] - found[0][phase, "experts"]
            assert more == pytest.approx(started * products * cost), (kind, phase)
