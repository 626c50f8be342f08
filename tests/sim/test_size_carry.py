"""A plan of one cluster on another: degrees that stay, ranks that are used, batches that divide."""

from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.search.problem import worked_out
from mopsim.size import Goal, Point, Request, size_all
from mopsim.size.carry import carried
from mopsim.size.figures import DAY
from mopsim.size.known import KnownSteps
from mopsim.spec.strategy import Attention, Dense, Experts, Pipeline, Strategy
from mopsim.spec.training import TrainSpec
from tests.sim.toys import machine, small


def plan(
    world: int = 64, stages: int = 4, context: int = 1, tensor: int = 1, micro_batch: int = 1
) -> Strategy:
    ranks = world // stages
    return Strategy(
        name="plan",
        world_size=world,
        micro_batch=micro_batch,
        pipeline=Pipeline(pipeline_parallel=stages),
        dense=Dense(fsdp=ranks, tensor_parallel=tensor, zero=1),
        attention=Attention(context_parallel=context),
        experts=Experts(expert_parallel=8, expert_fsdp=max(1, ranks // 8)),
    )


def test_data_parallel_ranks_grow_first_then_those_of_a_sequence_then_stages() -> None:
    first, second, third = carried(plan(), 128, 64)
    assert (first.pipeline.pipeline_parallel, first.attention.context_parallel, first.dense.fsdp) == (
        4,
        1,
        32,
    )
    assert first.experts.expert_parallel == 8
    assert first.experts.expert_fsdp == 4
    assert (second.pipeline.pipeline_parallel, second.attention.context_parallel) == (4, 2)
    assert (third.pipeline.pipeline_parallel, third.dense.fsdp) == (8, 16)


def test_there_and_back_is_the_same_plan() -> None:
    there = next(carried(plan(), 256, 256))
    assert plan() in list(carried(there, 64, 256))


def test_a_batch_that_does_not_divide_takes_a_smaller_microbatch_or_another_form() -> None:
    assert next(carried(plan(micro_batch=4), 128, 96)).micro_batch == 1
    assert next(carried(plan(stages=1, micro_batch=4), 128, 384)).micro_batch == 3
    assert all(96 % (one.micro_batch * one.data_groups) == 0 for one in carried(plan(micro_batch=4), 384, 96))


def test_expert_parallel_ranks_that_do_not_divide_become_as_many_as_do() -> None:
    """7 nodes had the plan of another family, 7 % slower, since that of 6 spreads experts over 16 ranks."""
    found = next(carried(plan(world=48, stages=1), 56, 56))  # 8 divide both
    assert (found.experts.expert_parallel, found.experts.expert_fsdp) == (8, 7)
    wide = replace(plan(world=48, stages=1), experts=Experts(expert_parallel=16, expert_fsdp=3))
    found = next(carried(wide, 56, 56))
    assert (found.experts.expert_parallel, found.experts.expert_fsdp, found.dense.fsdp) == (8, 7, 56)
    assert next(carried(wide, 96, 96)).experts.expert_parallel == 16


def test_interleaving_needs_microbatches_in_multiples_of_the_stages() -> None:
    whole = replace(plan(), pipeline=Pipeline(pipeline_parallel=4, virtual_stages=2, schedule="interleaved"))
    assert next(carried(whole, 128, 128)).pipeline.virtual_stages == 2
    assert next(carried(whole, 128, 96)).pipeline == Pipeline(pipeline_parallel=4)


@settings(deadline=None, max_examples=60)
@given(
    world=st.sampled_from([8, 16, 48, 64, 320, 576]),
    more=st.sampled_from([8, 24, 64, 128, 160, 1152]),
    stages=st.sampled_from([1, 2, 4]),
    context=st.sampled_from([1, 2]),
    tensor=st.sampled_from([1, 2]),
    batch=st.sampled_from([16, 96, 1024]),
)
def test_every_form_uses_all_ranks_and_divides_the_batch(
    world: int, more: int, stages: int, context: int, tensor: int, batch: int
) -> None:
    try:
        given_plan = plan(world, stages, context, tensor)
    except MopError:
        return
    for found in carried(given_plan, more, batch):
        assert found.world_size == more
        TrainSpec(seq_len=2**10 * 3**3 * 5, global_batch=batch).check_strategy(found)


def test_a_family_that_is_slower_by_far_is_not_searched_at_the_counts_around() -> None:
    request = Mock(families=("mop", "fsdp2", "megatron"))
    known = KnownSteps(request, Mock())
    known.behind[64].add("fsdp2")
    known.behind[1024].update(("mop", "megatron"))
    assert known.hopeful(128) == ("mop", "megatron")
    assert known.hopeful(16) == ("mop", "megatron")
    assert known.hopeful(512) == ("fsdp2",)
    assert known.hopeful(8) == known.hopeful(256) == request.families
    known.searched[128].update(("mop", "megatron"))
    assert not known.unsearched(128)


def test_what_a_bound_rules_out_moves_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same points, plans and gaps as where all that is carried is simulated, which is more."""
    goal = Goal(10**12, 3 * DAY)
    asked = Request(small(), goal, 512, 2**17, ("mop", "megatron"), max_nodes=64, simulations=1)
    fewer = size_all(asked, [machine()])[0]
    monkeypatch.setattr("mopsim.size.ask.slower", lambda *given: False)
    worked_out.cache_clear()  # answers among it
    every = size_all(asked, [machine()])[0]
    assert fewer.simulated < every.simulated
    assert [_told(one) for one in fewer.tried] == [_told(one) for one in every.tried]


def _told(point: Point) -> tuple[object, ...]:
    result = point.result
    return point.num_nodes, result and (result.strategy, result.step_time), point.gap, point.why
