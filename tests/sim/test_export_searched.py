"""Every strategy that a search may try is written for each target, or refused by it."""

import ast
import math
import tomllib
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mopsim.export import TARGETS, export
from mopsim.search.problem import Problem
from mopsim.search.space import Space
from mopsim.spec.capability import refusals
from mopsim.strategies import FAMILIES, mop
from tests.sim.spaces import spread
from tests.sim.test_export import plan, replace
from tests.sim.toys import machine

READ: dict[str, Callable[[str], Any]] = {"torchtitan": tomllib.loads, "torchtitan-main": ast.parse}


@cache
def searched(family: str) -> Space:
    base = plan(mop(32, expert_parallel=8))
    given_problem = Problem(base.model, machine(), 4, base.training)
    return spread(given_problem, family)


@settings(deadline=None, max_examples=60)
@given(family=st.sampled_from(sorted(FAMILIES)), place=st.floats(0, 1, exclude_max=True))
def test_every_strategy_of_the_search_is_written_or_refused(family: str, place: float) -> None:
    base = plan(mop(32, expert_parallel=8))
    space = searched(family)
    made = replace(base, strategy=space.build(int(place * len(space))), stack=space.stack)
    for name in TARGETS:
        text, gaps = export(made, name, lossy=True)
        assert [str(gap) for gap in gaps] == [str(gap) for gap in refusals(made, by=name)]
        found = READ.get(name, yaml.safe_load)(text)
        if name == "torchtitan" and not gaps:
            p = found["parallelism"]
            degrees = [p[f"{kind}_parallel_degree"] for kind in ("context", "tensor", "pipeline")]
            data = p["data_parallel_replicate_degree"] * p["data_parallel_shard_degree"]
            assert data * math.prod(degrees) == made.strategy.world_size
        if name == "deepspeed" and not gaps:
            per_step = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"]
            assert found["train_batch_size"] == per_step * made.strategy.data_groups
