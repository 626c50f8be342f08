"""What torch and Megatron-LM hold beside: buckets, gathers in fp32, a shifted copy of the logits."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.engine import SimResult, simulate
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import machine, small
from tests.software import changed


def played(plan: Strategy, stack: str, **sections: dict[str, Any]) -> SimResult:
    training = TrainSpec(seq_len=64, global_batch=8)
    return simulate(small(), machine(), 1, plan, training, changed(stack, **sections))


def whole(ranks: int) -> Strategy:
    plan = megatron(world_size=ranks)
    return replace(
        plan, dense=replace(plan.dense, zero=0, fsdp=1), experts=replace(plan.experts, expert_fsdp=1)
    )


def test_ranks_that_sum_whole_gradients_have_buckets() -> None:
    one, two = (played(whole(n), "litgpt") for n in (1, 2))
    assert two.memory_by_category["grads"] == 2 * one.memory_by_category["grads"]


@pytest.mark.parametrize("gathers", ["compute", "param"])
def test_weights_are_gathered_as_shards_are_where_nothing_casts_them(gathers: str) -> None:
    found = played(fsdp2(world_size=2), "transformers-fsdp1", sharding={"gathers": gathers})
    usual = played(fsdp2(world_size=2), "transformers-fsdp1")
    times = 2 if gathers == "param" else 1
    assert found.highest_by_category["gathered"] == times * usual.highest_by_category["gathered"]


def test_a_maximum_that_is_subtracted_out_of_place_takes_another_copy() -> None:
    usual, more = (
        played(megatron(world_size=1), "megatron-lm", kernels={"loss": loss})
        for loss in ("composed", "shifted")
    )
    logits = 64 * small().vocab_size * 4
    assert more.highest_by_category["logits"] == usual.highest_by_category["logits"] + logits
