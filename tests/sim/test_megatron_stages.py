"""Pipelines: schedules, bubbles, parts of a stage, and what hides behind another microbatch."""

import msgspec
import pytest

from mopsim.common.errors import SpecError
from mopsim.engine import run, simulate
from mopsim.program import lower
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Overlap
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.megatron_jobs import MACHINE, deep, parted, play, with_
from tests.sim.toys import quantity, small


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("stages", [2, 4])
def test_composed_microbatches_equal_expanded_ones(schedule: str, stages: int) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    strategy = megatron(
        8 * stages, tensor_parallel=2, pipeline_parallel=stages, virtual_stages=virtual, expert_parallel=2
    )
    pipeline = msgspec.structs.replace(strategy.pipeline, schedule=schedule)
    strategy = with_(strategy, pipeline=pipeline)
    model = small(num_hidden_layers=8)
    training = TrainSpec(seq_len=256, global_batch=4 * 12 * stages)
    composed, whole = (
        run(lower(model, strategy, training, 8, expand=expand), model, MACHINE, strategy, training)
        for expand in (False, True)
    )
    assert composed.step_time == pytest.approx(whole.step_time, rel=1e-9)
    assert composed.peak_memory == whole.peak_memory
    assert composed.num_events < whole.num_events
    for kind, seconds in whole.busy.items():
        assert composed.busy[kind] == pytest.approx(seconds, rel=1e-9), kind


def test_turns_that_differ_in_a_pattern_are_not_all_played() -> None:
    """Eight stages on a late host, whose turns differ in a pattern for as long as the step lasts."""
    model = load_model("qwen3_30b_a3b")
    model = msgspec.structs.replace(model, **model.cut(16))
    profile = load_profile("a100-sxm-80g")
    late = msgspec.structs.replace(profile.host, cpu_launch_time=quantity(35, "us"))
    profile = msgspec.structs.replace(profile, host=late)
    plan = megatron(32, pipeline_parallel=8, tensor_parallel=4, expert_parallel=4, token_dispatcher="deepep")
    training = TrainSpec(seq_len=4096, global_batch=130)
    brief, whole = (
        run(lower(model, plan, training, 8, expand=expand), model, profile, plan, training)
        for expand in (False, True)
    )
    assert brief.num_events < whole.num_events / 5
    assert brief.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert brief.peak_by_stage == whole.peak_by_stage
    for found, wanted in (
        (brief.time_by_component, whole.time_by_component),
        (brief.exposed, whole.exposed),
    ):
        assert found == pytest.approx(wanted, abs=2e-3 * whole.step_time)


@pytest.mark.parametrize("overlap", [Overlap(), Overlap(pipeline=True)])
@pytest.mark.parametrize("woven", [False, True])
@pytest.mark.parametrize(("stages", "virtual", "microbatches"), [(2, 2, 2), (2, 2, 8), (3, 3, 9), (4, 2, 12)])
def test_hosts_that_wait_for_each_other_go_on(
    stages: int, virtual: int, microbatches: int, woven: bool, overlap: Overlap
) -> None:
    """Hosts wait for route counts and for receives; parts of two stages on both sides of each other."""
    host = msgspec.structs.replace(MACHINE.host, cpu_launch_time=quantity(10, "us"))
    slow = msgspec.structs.replace(MACHINE, host=host)
    overlap = msgspec.structs.replace(overlap, experts=woven)
    strategy = megatron(
        2 * stages, pipeline_parallel=stages, virtual_stages=virtual, expert_parallel=2, overlap=overlap
    )
    training = TrainSpec(seq_len=64, global_batch=2 * microbatches)
    result = simulate(small(num_hidden_layers=12), slow, 4, strategy, training)
    free = simulate(small(num_hidden_layers=12), MACHINE, 4, strategy, training)
    assert result.step_time > free.step_time
    assert result.flops == pytest.approx(free.flops)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_a_schedule_of_one_part_a_stage_is_refused_for_several(schedule: str) -> None:
    strategy = megatron(4, pipeline_parallel=2, virtual_stages=2)
    pipeline = msgspec.structs.replace(strategy.pipeline, schedule=schedule)
    with pytest.raises(SpecError, match=rf"pipeline.schedule: '{schedule}' .* needs interleaved"):
        with_(strategy, pipeline=pipeline)


@pytest.mark.parametrize(("stages", "virtual", "microbatches"), [(4, 1, 8), (4, 2, 8), (2, 4, 4), (8, 1, 16)])
def test_bubble_of_equal_stages(stages: int, virtual: int, microbatches: int) -> None:
    """(p - 1) / (m v) of arXiv 2104.04473, on a network whose embedding and loss hardly count."""
    strategy = megatron(stages, pipeline_parallel=stages, virtual_stages=virtual)
    model = deep(8 if virtual < 4 else 16)
    found = play(model, strategy, microbatches, 16384)  # long sequences: the optimizer hardly counts
    one = play(model, megatron(1), microbatches, 16384)
    ideal = one.step_time / stages
    assert found.step_time / ideal - 1 == pytest.approx((stages - 1) / microbatches / virtual, rel=0.08)


def test_zero_bubble_is_faster_and_holds_more() -> None:
    strategy = megatron(4, pipeline_parallel=4)
    zero = with_(strategy, pipeline=msgspec.structs.replace(strategy.pipeline, schedule="zero_bubble"))
    plain, split = play(deep(), strategy, 8), play(deep(), zero, 8)
    assert split.step_time < plain.step_time
    assert plain.peak_memory <= split.peak_memory < 1.5 * plain.peak_memory


def test_zero_bubble_splits_the_layers_that_predict_further() -> None:
    """Their weight gradients come later too: the same products in a step, nothing left over."""
    strategy = megatron(4, pipeline_parallel=4)
    zero = with_(strategy, pipeline=msgspec.structs.replace(strategy.pipeline, schedule="zero_bubble"))
    model = deep(num_nextn_predict_layers=2)
    plain, split = play(model, strategy, 8), play(model, zero, 8)
    assert split.busy["matmul"] == pytest.approx(plain.busy["matmul"], rel=1e-9)
    assert split.step_time < plain.step_time


@pytest.mark.parametrize("layers", [(5, 3), (8, 0)])
def test_parts_hold_the_layers_they_are_given(layers: tuple[int, ...]) -> None:
    model, training = deep(8), TrainSpec(seq_len=256, global_batch=16)
    strategy = parted(*layers)
    workload = lower(model, strategy, training, 8)
    held = [len({op.layer for op in program.ops if op.layer >= 0}) for program in workload.programs]
    assert held == list(layers)
    run(workload, model, MACHINE, strategy, training)


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (4, 2), (2, 4)])
def test_expert_exchanges_hide_behind_another_microbatch(pipeline: int, virtual: int) -> None:
    model = small(num_hidden_layers=8, hidden_size=1024, moe_intermediate_size=4096, head_dim=128)
    strategy = megatron(4 * pipeline, pipeline_parallel=pipeline, virtual_stages=virtual, expert_parallel=4)
    strategy = with_(strategy, overlap=Overlap())  # sends beside compute fill an unwoven pipeline faster
    beside = with_(strategy, overlap=Overlap(experts=True))
    training = TrainSpec(seq_len=1024, global_batch=4 * 6 * 4)
    plain = play(model, strategy, training.global_batch, 1024)
    composed, whole = (
        run(lower(model, beside, training, 8, expand=expand), model, MACHINE, beside, training)
        for expand in (False, True)
    )
    assert composed.step_time == pytest.approx(whole.step_time, rel=1e-9)
    assert whole.step_time < plain.step_time
    assert whole.exposed["all_to_all"] < 0.6 * plain.exposed["all_to_all"]
    assert whole.busy["all_to_all"] == pytest.approx(plain.busy["all_to_all"])
    assert whole.peak_memory > plain.peak_memory


def test_overlapped_layers_run_in_megatron_cores_order() -> None:
    """That of its TransformerLayerSchedulePlan.run (01cf4fb5, models/common/model_chunk_schedule_plan.py)."""
    strategy = megatron(8, expert_parallel=4, tensor_parallel=2, context_parallel=2)
    strategy = with_(strategy, overlap=Overlap(experts=True))
    training = TrainSpec(seq_len=256, global_batch=24)
    (program,) = lower(small(num_hidden_layers=4), strategy, training, 8, expand=True).programs
    found = [f"{op.name} {op.phase}" for op in program.ops if (op.microbatch, op.layer) in ((1, 2), (0, 2))]
    kept = (
        "combine backward", "attention_core forward", "unsort backward", "counts read forward",
        "dispatch forward", "dispatch backward", "sort forward", "combine forward", "attention_core backward",
    )  # fmt: skip
    begin = found.index("combine backward")
    assert tuple(name for name in found[begin:] if name in kept)[: len(kept)] == kept


def test_context_ranks_gain_nothing_from_a_sequence_that_is_cut() -> None:
    """As many tokens a rank, of more sequences in more parts: the exchange is on top of it."""
    model, profile, seconds = load_model("qwen3_30b_a3b"), load_profile("h100-sxm-80g"), []
    training = TrainSpec(seq_len=4096, global_batch=512)
    for ranks in (1, 2, 4):
        plan = megatron(
            32, pipeline_parallel=2, virtual_stages=6, expert_parallel=16, token_dispatcher="deepep",
            context_parallel=ranks, context_exchange="all_gather", micro_batch=2 * ranks,
            overlap=Overlap(experts=True),
        )  # fmt: skip
        seconds.append(simulate(model, profile, 4, plan, training).step_time)
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(("zero", "shard"), [(0, 1), (1, 2)])
def test_a_stage_in_the_middle_may_have_no_layers(zero: int, shard: int) -> None:
    strategy = megatron(8, pipeline_parallel=4)
    dense = msgspec.structs.replace(strategy.dense, zero=zero, fsdp=shard)
    pipeline = msgspec.structs.replace(strategy.pipeline, layers=(4, 0, 4, 0))
    uneven = play(deep(8), with_(strategy, dense=dense, pipeline=pipeline), 8)
    even = play(deep(8), with_(strategy, dense=dense), 8)
    assert even.step_time < uneven.step_time < 2.5 * even.step_time
