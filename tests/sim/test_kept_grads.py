"""Gradients of a microbatch that stay beside their sums, outputs that stages hold, flat tensors of a step's
end: by hand, and the same however a program is put together."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, run, upper
from mopsim.program import lower
from mopsim.program.context import Context, make_context
from mopsim.program.loss import logit_elements
from mopsim.program.stage import Stage
from mopsim.program.workload import NUM_DEVICE_SLOTS, SLOT, Workload
from mopsim.spec.stack import Kernels, Sharding, Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.toys import machine, small

MODEL = small(num_hidden_layers=16, first_k_dense_replace=0, num_nextn_predict_layers=0)
TRAINING = TrainSpec(seq_len=32, global_batch=32)
SUMS = {"grad": "float32", "reduce": "float32"}


def _strategy(world: int = 1, **degrees: Any) -> Strategy:
    strategy = megatron(world, recompute="full", **degrees)
    return replace(strategy, precision=replace(strategy.precision, **SUMS))


def _stack(grads: str = "kept", **more: Any) -> Stack:
    how = {name: more.pop(name) for name in ("update_copies", "buckets", "reduce_copies") if name in more}
    sharding = Sharding(microbatch_grads=grads, **how)  # type: ignore[arg-type]
    return Stack(name="mine", kernels=Kernels(weight_grads="composed"), sharding=sharding, **more)


def _lowered(strategy: Strategy, stack: Stack, **how: Any) -> Workload:
    return lower(MODEL, strategy, TRAINING, 8, stack, **how)


def _played(workload: Workload, strategy: Strategy) -> SimResult:
    return run(workload, MODEL, machine(), strategy, TRAINING)


def _numels(stack: Stack, strategy: Strategy, stage: int = 0) -> int:
    context = make_context(MODEL, strategy, TRAINING, 8, stack)
    return sum(unit.numel for unit in Stage(context, stage).units)


@pytest.mark.parametrize("tied", [False, True])
def test_all_gradients_are_there_but_in_a_backward(tied: bool) -> None:
    model = replace(MODEL, tie_word_embeddings=tied, total_params=None, active_params=None)
    strategy, stack = _strategy(), _stack()
    (program,) = lower(model, strategy, TRAINING, 8, stack, expand=True).programs
    context = make_context(model, strategy, TRAINING, 8, stack)
    size = 2 * sum(unit.numel for unit in Stage(context, 0).units)
    start = dict(program.resident)["grads"]
    there, seen = start, {"forward": set[int](), "backward": set[int]()}
    for op in program.ops:
        there += dict(op.net).get(SLOT["grads"], 0)
        if op.name == "gradients added" or op.phase == "forward":
            seen["forward"].add(there - start)
        elif op.phase == "backward" and op.microbatch >= 0:
            seen["backward"].add(there - start)
    assert start == size
    assert seen["forward"] == {0}, "through forwards all are there"
    assert min(seen["backward"]) == -size, "a backward begins with none"
    assert there == start


def test_the_add_reads_and_writes_what_it_does_by_hand() -> None:
    strategy = _strategy()
    kept, added = (_lowered(strategy, _stack(how), expand=True) for how in ("kept", "added"))
    numel = _numels(_stack(), strategy)
    op, *others = (one for one in kept.programs[0].ops if one.name == "gradients added")
    assert [work.bytes for work in op.work] == [numel * (2 + 4 + 4 + 4 + 4)]
    assert len(others) == TRAINING.global_batch - 1
    context = make_context(MODEL, strategy, TRAINING, 8, _stack())
    largest = max(unit.largest for unit in Stage(context, 0).units)
    assert dict(op.peak)[SLOT["grads"]] >= 4 * largest, "a copy of one parameter's in fp32"
    assert not any(op.name == "gradients added" for op in added.programs[0].ops)
    times = [_played(one, strategy).step_time for one in (added, kept)]
    assert times[0] < times[1]


def test_a_program_of_few_layers_and_microbatches_is_the_whole_one() -> None:
    strategy = _strategy()
    short, whole = _lowered(strategy, _stack()), _lowered(strategy, _stack(), expand=True)
    assert any(program.repeats for program in short.programs)
    found, expected = _played(short, strategy), _played(whole, strategy)
    assert found.peak_memory == expected.peak_memory
    assert found.step_time == pytest.approx(expected.step_time)
    assert found.memory_by_category == expected.memory_by_category


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("outputs", ["freed", "held", "parts"])
def test_a_step_ends_as_it_began(schedule: str, outputs: Any) -> None:
    virtual = {"virtual_stages": 2} if schedule == "interleaved" else {}
    strategy = _strategy(4, pipeline_parallel=2)
    pipeline = replace(strategy.pipeline, schedule=schedule, **virtual)  # type: ignore[arg-type]
    strategy = replace(strategy, pipeline=pipeline)
    for program in _lowered(strategy, _stack(stage_outputs=outputs), expand=True).programs:
        left = dict.fromkeys(range(NUM_DEVICE_SLOTS), 0)
        for op in program.ops:
            for slot, size in op.net:
                left[slot] += size
        assert not any(left.values())


def test_nothing_is_kept_where_sums_are_as_narrow_or_sharded() -> None:
    narrow = megatron(8, recompute="full")
    sharded = replace(_strategy(8), dense=replace(_strategy(8).dense, zero=2))
    for strategy in (narrow, sharded):
        kept, added = (_lowered(strategy, _stack(how)) for how in ("kept", "added"))
        assert _played(kept, strategy).peak_memory == _played(added, strategy).peak_memory
        assert _played(kept, strategy).step_time == _played(added, strategy).step_time


def test_stages_hold_what_they_send_and_the_last_one_two_logits() -> None:
    strategy = _strategy(4, pipeline_parallel=4)
    freed, held = (
        _played(_lowered(strategy, _stack(stage_outputs=how)), strategy) for how in ("freed", "held")
    )
    context = make_context(MODEL, strategy, TRAINING, 8, _stack())
    more = [new - old for old, new in zip(freed.peak_by_stage, held.peak_by_stage, strict=True)]
    assert more[-1] == context.tokens * MODEL.vocab_size * context.b
    # of the microbatches under way; the last one's is there while it is sent, too
    assert more[:-1] == [(3 - stage) * context.hidden for stage in range(3)]
    assert held.step_time == freed.step_time


def _flat(strategy: Strategy, training: TrainSpec = TRAINING, **entries: float) -> tuple[int, Context, Stage]:
    context = make_context(MODEL, strategy, training, 8, _stack(**entries))
    stage = Stage(context, 0)
    return stage.flat_bytes, context, stage


def test_flat_tensors_of_a_steps_end_by_hand() -> None:
    narrow, wide = megatron(8, pipeline_parallel=2), _strategy(8, pipeline_parallel=2)
    size, _, stage = _flat(narrow, update_copies=8)
    assert size == 8 * sum(stage.updated)
    assert _flat(narrow, update_copies=8, buckets=1e9)[0] == 1e9, "whichever is more"
    assert _flat(wide, update_copies=8, buckets=1e9)[0] == 0, "gradients in fp32 are updated from as they are"
    size, _, stage = _flat(wide, reduce_copies=2)
    assert size == 2 * sum(unit.padded for unit in stage.units)
    whole = replace(narrow, dense=replace(narrow.dense, zero=0))
    assert _flat(whole, update_copies=8, buckets=1e9)[0] == 0, "they are ZeRO-1's"
    alone = _strategy(2, pipeline_parallel=2)
    assert _flat(alone, reduce_copies=2)[0] == 0, "nothing is reduced"
    one = megatron(8)
    _, context, _ = _flat(one)
    logits = context.tokens * MODEL.vocab_size * context.wide
    assert _flat(one, buckets=logits)[0] == 0, "the logits' blocks serve it"
    assert _flat(one, buckets=logits + 1)[0] == logits + 1


def test_torch_pipelines_return_the_logits_of_all_microbatches() -> None:
    """They stay through the update, and are copied together before it; an inner stage has none."""
    strategy = _strategy(8, pipeline_parallel=2)
    freed, kept = (
        _lowered(strategy, _stack(stage_outputs=how), expand=True) for how in ("freed", "returned")
    )
    assert freed.programs[0] == kept.programs[0]
    context = make_context(MODEL, strategy, TRAINING, 8, _stack(stage_outputs="returned"))
    size, count = logit_elements(context) * context.b, TRAINING.num_microbatches(strategy)
    few = _lowered(strategy, _stack(stage_outputs="returned"))
    heights = []
    for program in (freed.programs[1], kept.programs[1], few.programs[1]):
        there = dict(program.resident).get("logits", 0)
        found = [there]
        for op in program.ops:
            found.append(there + dict(op.peak).get(SLOT["logits"], 0))
            there += dict(op.net).get(SLOT["logits"], 0)
        heights.append(max(found))
        assert there == dict(program.resident).get("logits", 0)
    assert count > len({op.microbatch for op in few.programs[1].ops}) - 1
    assert heights[0] < heights[1] == heights[2] == 2 * count * size


def test_cached_blocks_lie_above_what_the_passes_had() -> None:
    assert upper.cached_blocks(5, 10, 10) == 5
    assert upper.cached_blocks(5, 8, 10) == 3
    assert upper.cached_blocks(5, 4, 10) == 0
    assert upper.cached_blocks(0, 10, 8) == 0, "none"
    strategy = megatron(8, pipeline_parallel=2)
    without, there = (_played(_lowered(strategy, _stack(buckets=size)), strategy) for size in (0.0, 2.0**30))
    assert without.peak_memory == there.peak_memory
    idle, none = (one.reserved_memory - one.peak_memory for one in (there, without))
    assert idle > 2**29 > none
    assert there.above_peak.get("copies", 0) == max(0, there.resident_memory + 2**30 - there.peak_memory)
    assert there.p_fits <= without.p_fits


@pytest.mark.parametrize(
    ("field", "value"),
    [("owners", True), ("sums", "whole"), ("grad_passes", 6), ("microbatch_grads", "kept"), ("buckets", 1e9),
     ("update_copies", 4), ("reduce_copies", 2), ("reductions", "asked"), ("update_group", 1e9),
     ("norm_passes", 18), ("check_copies", 8), ("search_copies", 7),
     ("searched", "scaled"), ("host_room", 2)],
)  # fmt: skip
def test_what_fsdp_cannot_do_is_refused(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"^{field}: .* with fsdp, under which each rank sums"):
        Sharding(fsdp=True, **{field: value})
    with pytest.raises(SpecError, match="flat: True is torch's FSDP1"):
        Sharding(fsdp=True, flat=True, copies=True)
    with pytest.raises(SpecError, match=r"^sharding\.microbatch_grads: 'kept' must be 'added' with explicit"):
        _stack(explicit=True)
