"""Predicted against tracked peaks of plans drawn at random, of the ranks with the most and the fewest rows:
what no other test has together."""

import pytest

from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from tests.parity.drawn_plans import drawn_plan
from tests.parity.tracked import second_step
from tests.sim.toys import machine

SEEDS = [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 80))]


@pytest.mark.parametrize("seed", SEEDS)
def test_peaks(seed: int) -> None:
    plan = drawn_plan(seed)
    ranks = {0, plan.strategy.world_size - 1} if plan.training.routing != "balanced" else {0}
    tracked = max((second_step(plan, rank, MemoryTracker) for rank in ranks), key=lambda one: one.peak_memory)
    result = simulate(plan.model, machine(memory=1000), 1, plan.strategy, plan.training, plan.stack)
    assert result.peak_memory == pytest.approx(tracked.peak_memory, rel=0.01)
    assert result.host_memory == pytest.approx(tracked.host_memory, rel=0.01)
