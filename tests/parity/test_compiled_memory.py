"""Memory of compiled blocks: the simulator's against what a dry run tracks, whose layers run as they are, by
operators that keep what the graphs keep.
"""

from typing import Any

import pytest
from msgspec.structs import replace

from mopexec.measure.tracker import MemoryTracker
from mopsim.engine import simulate
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.parity.test_memory_parity import LATENT, SMALL
from tests.parity.tracked import second_step
from tests.plans import plan_of, split
from tests.sim.toys import machine

STRATEGIES: dict[str, Strategy] = {
    "fsdp2": fsdp2(2, expert_parallel=2, recompute="none"),
    "fsdp2, full": fsdp2(2, expert_parallel=2, loss="chunked"),
    "split": split(2, expert_parallel=2),
    "split, full": split(2, expert_parallel=2, recompute="full"),
    "stages": split(2, pipeline_parallel=2),
}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("model", [SMALL, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_tracked_and_predicted_agree(name: str, model: Any, kind: str) -> None:
    strategy = replace(STRATEGIES[name], compile="block")
    training = TrainSpec(seq_len=4096, global_batch=2 * strategy.data_groups)
    plan = plan_of(model, strategy, training, kind)
    tracked = second_step(plan, 0, MemoryTracker)
    result = simulate(model, machine(memory=1000), 1, strategy, training, plan.stack)
    assert result.peak_memory == pytest.approx(tracked.peak_memory, rel=0.02)
