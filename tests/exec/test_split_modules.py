"""Every mechanism of split_modules, and those that fully_shard shares with it, alone and together, equal the
single-device model: loss, gradients, weights after two clipped steps.
"""

from collections.abc import Callable

import pytest
import torch

from mopsim.spec.plan import Plan
from tests.exec import sharded_plans
from tests.exec.spawn import pool
from tests.exec.split_plans import cases


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_mechanism_equals_the_single_device_model(world: int) -> None:
    check(pool(world).run("tests.exec.split_parity", "compare", cases(world))[0])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_fully_shard_equals_it_too(world: int) -> None:
    check(pool(world).run("tests.exec.split_parity", "compare", sharded_plans.cases(world))[0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("cases", [cases, sharded_plans.cases], ids=["split_modules", "fully_shard"])
def test_on_gpus(cases: Callable[[int], dict[str, tuple[Plan, str]]]) -> None:
    """Over NCCL; blocks of keys in float64 have no kernel there."""
    world = max(count for count in (2, 4, 8) if count <= torch.cuda.device_count())
    known = {name: case for name, case in cases(world).items() if not _by_blocks(case[0])}
    check(pool(world, cuda=True).run("tests.exec.split_parity", "compare", known)[0])


def _by_blocks(plan: Plan) -> bool:
    attention = plan.strategy.attention
    return attention.context_parallel > 1 and attention.cp_comm_type != "ulysses"


def check(found: dict[str, dict[str, float]]) -> None:
    """Within 1e-9 in float64."""
    for name, worst in found.items():
        tolerance = 1e-4 if "float32" in name else 1e-9
        assert max(worst.values()) <= tolerance, (name, worst)
