"""Torch's FSDP2 under pipelines: a dry run gathers and reduces as often as the simulator's program."""

from collections import Counter
from typing import Any

import pytest

from mopexec.check import dry_run
from mopexec.distributed import collectives
from mopexec.run.apply import build
from mopsim.program import lower
from mopsim.spec.plan import Plan
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.plans import plan_of
from tests.sim.toys import small

MODEL = small(num_hidden_layers=8)
NAMES = {"all_gather": "gather", "reduce_scatter": "reduce"}


def _plan(virtual_stages: int, **options: Any) -> Plan:
    strategy = fsdp2(4, pipeline_parallel=2, virtual_stages=virtual_stages, **options)
    return plan_of(MODEL, strategy, TrainSpec(seq_len=256, global_batch=8), "cuda")


def _run(plan: Plan, stage: int) -> Counter[str]:
    found: Counter[str] = Counter()

    def observer(kind: str, _: int, issue: Any, __: Any) -> Any:
        found.update([NAMES[kind]] if kind in NAMES else [])
        return issue()

    with dry_run._fake_platform(plan, stage * plan.strategy.stage_ranks) as platform:
        runner, batches = build(plan, platform, routing="profile"), dry_run._batches(plan, platform)
        before = collectives.observe(observer)
        try:
            runner.step(batches)
        finally:
            collectives.observe(before)
    return found


@pytest.mark.parametrize("stays", [False, True], ids=["freed", "kept"])
@pytest.mark.parametrize("virtual_stages", [1, 2], ids=["1f1b", "interleaved"])
def test_a_stage_gathers_and_reduces_as_often_as_simulated(virtual_stages: int, stays: bool) -> None:
    """A backward frees what the forwards of other parts of the stage have kept."""
    plan = _plan(virtual_stages, reshard_after_forward=not stays, recompute="none" if stays else "full")
    programs = lower(plan.model, plan.strategy, plan.training, 8, plan.stack).programs
    for program in programs:
        names = (op.name.partition(" ")[0] for op in program.ops)
        assert Counter(name for name in names if name in NAMES.values()) == _run(plan, program.stage)
