"""Gradients that are scaled in a pass of their own, by hand (Sharding.scaled)."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.data_parallel import scaled
from mopsim.program.stage import Stage
from mopsim.program.workload import Op
from mopsim.spec.sharding import Sharding
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.toys import small

TRAINING = TrainSpec(seq_len=32, global_batch=16)


def _stack(way: Any) -> Stack:
    return Stack(name="mine", sharding=Sharding(scaled=way))


def _passed(way: str, strategy: Strategy, *, summed: bool = False) -> tuple[float, float, float]:
    """Bytes of the pass over the gradients, and those of routed experts' and of all gradients."""
    context = make_context(small(), strategy, TRAINING, 8, _stack(way))
    units = Stage(context, 0).units
    size = sum(work.bytes for work in scaled(context, units, summed=summed))
    routed, whole = (
        sum(unit.padded * context.grad for unit in units if unit.component == "experts" or part == "all")
        for part in ("experts", "all")
    )
    assert 0 < routed < whole
    return size, float(routed), float(whole)


def _ops(way: str, strategy: Strategy) -> list[Op]:
    return list(lower(small(), strategy, TRAINING, 8, _stack(way)).programs[0].ops)


def test_each_gradient_is_read_and_written_as_wide_as_it_is_kept() -> None:
    strategy = megatron(8, expert_parallel=2)
    for dtype in ("bfloat16", "float32"):
        kept = replace(strategy, precision=replace(strategy.precision, grad=dtype, reduce=dtype))
        size, _, whole = _passed("all", kept)
        assert size == 2 * whole
    assert _passed("none", strategy)[0] == 0.0


def test_a_rank_whose_tokens_are_all_there_are_scales_nothing() -> None:
    alone = megatron(1)
    assert _passed("all", alone)[0] == 0.0
    assert _passed("experts", alone)[0] == 0.0
    size, _, whole = _passed("tokens", alone, summed=True)
    assert size == 2 * whole, "by the tokens of the step, however many ranks there are"


def test_a_mean_over_fewer_copies_is_scaled() -> None:
    size, routed, _ = _passed("experts", megatron(8, expert_parallel=2))
    assert size == 2 * routed
    assert _passed("experts", megatron(8))[0] == 0.0, "all have as many copies"


def test_reductions_of_shards_take_the_mean() -> None:
    strategy = megatron(8)
    sharded = replace(strategy, dense=replace(strategy.dense, zero=2))
    assert _passed("all", sharded)[0] == 0.0


@pytest.mark.parametrize("hidden", [False, True])
def test_compute_scales_before_reductions_or_after_all_of_them(hidden: bool) -> None:
    strategy = megatron(8)
    strategy = replace(strategy, overlap=replace(strategy.overlap, grad_reduce=hidden))
    ops = _ops("all", strategy)
    passes = {op.index for op in ops if op.name == "scaled gradients"}
    sums = [op for op in ops if op.name == "reduce gradients"]
    assert len(passes) > 1 if hidden else len(passes) == 1
    assert sums
    assert all(passes & set(op.deps) for op in sums), "each waits for its own"
    ops = _ops("tokens", strategy)
    (after,) = (op for op in ops if op.name == "scaled gradients")
    assert {op.index for op in ops if op.name == "reduce gradients"} <= set(after.deps)
    assert all(op.index > after.index for op in ops if op.name in ("norm", "clip"))
