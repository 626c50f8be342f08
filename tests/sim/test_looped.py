"""Layers that are turns of a compiled loop, experts of a fixed room that masks fill, and pools of memory."""

import dataclasses

import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.cost.stack import as_used
from mopsim.engine import SimResult, simulate
from mopsim.graph.tape import Tape
from mopsim.program.context import make_context
from mopsim.program.lower import passes_of
from mopsim.report.tables import _limits
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.toys import machine, small
from tests.software import changed

JOB = TrainSpec(seq_len=512, global_batch=32)
MODEL = small(hidden_size=512, num_hidden_layers=6, moe_intermediate_size=512)
S, H, SEQUENCES = 512, 512, 2


def _plan(stack: Stack) -> Strategy:
    plan = fsdp2(16, expert_parallel=8, micro_batch=SEQUENCES)
    return replace(stack.resolve(plan), stack=stack.name)


def _tape(stack: Stack) -> Tape:
    return passes_of(make_context(MODEL, _plan(stack), JOB, 8, stack)).tape(2)


def _played(stack: Stack, memory: float = 80.0) -> SimResult:
    return simulate(MODEL, machine(memory=memory), 2, _plan(stack), JOB, stack=stack)


@pytest.mark.parametrize(("capacity", "each"), [(1.0, 128), (1.25, 160)])
def test_masks_fill_rooms_of_as_many_rows_of_each_sequence(capacity: float, each: int) -> None:
    """512 tokens choose 2 of 8 experts: 128 rows of each in a balanced load of a sequence."""
    stack = changed("maxtext-slurm", kernels={"expert_capacity": capacity})
    tape, slots = _tape(stack), 8 * each
    by_name = tape.by_name
    there, back = by_name["permute"].matmuls[0], by_name["accumulate"].matmuls[0]
    assert (there.m, there.n, there.k, there.count) == (slots, H, S, SEQUENCES)
    assert (back.m, back.n, back.k, back.count) == (S, H, slots, SEQUENCES)
    assert there.constant
    assert not back.constant
    assert tape.values["combine_mask"].bytes == SEQUENCES * S * slots * 2
    assert [one.m for one in by_name["experts_up"].matmuls] == [8 * SEQUENCES * each]
    assert by_name["dispatch"].bytes == SEQUENCES * slots * H * 2


def test_static_buffers_hold_what_may_come_to_a_rank() -> None:
    """Eight ranks, eight experts of which tokens choose two: all of them choose at most four times as many
    rows of a rank as a balanced load has."""
    fits = changed("maxtext-turbo", kernels={"expert_buffers": "fit"})
    some, most = _tape(fits), _tape(load_stack("maxtext-turbo"))
    assert most.values["rows"].bytes == 4 * some.values["rows"].bytes
    assert most.by_name["sort"].bytes == 4 * some.by_name["sort"].bytes
    assert most.by_name["experts_up"].matmuls == some.by_name["experts_up"].matmuls


def test_a_loop_hides_what_lies_within_its_turns_alone() -> None:
    """Beside the layers around them, beside the rest of a layer, beside nothing."""
    found = {
        how: _played(changed("maxtext-slurm", sharding={"loop": how}))
        for how in ("pipelined", "apart", "together")
    }
    gathers = {how: one.exposed["all_gather"] for how, one in found.items()}
    assert gathers["pipelined"] < gathers["apart"] < gathers["together"]
    assert gathers["together"] == pytest.approx(found["together"].busy["all_gather"], rel=0.02)
    assert found["together"].step_time > found["apart"].step_time > found["pipelined"].step_time


def test_copies_for_the_loop_and_gradients_of_all_layers_are_there() -> None:
    own = load_stack("maxtext-slurm")
    with_, without = _played(own), _played(changed("maxtext-slurm", sharding={"loop_copies": 0}))
    context = make_context(MODEL, _plan(own), JOB, 8, own)
    sizes = {unit.name: unit.shard_numel for unit in context.units()}
    edges = sum(unit.shard_numel for unit in context.edges.values())
    copies = with_.peak_memory - without.peak_memory
    assert copies == (sum(sizes.values()) - edges) * context.param
    assert with_.memory_by_category["grads"] == sum(sizes.values()) * context.grad


def test_a_pool_is_what_tensors_may_use_and_communicators_are_beside_it() -> None:
    stack = load_stack("maxtext-slurm")
    found = _played(stack)
    assert found.memory_limit == int(80e9 * stack.pool)
    assert not found.above_peak
    enough = found.peak_memory / stack.pool / 1e9
    assert _played(stack, memory=enough * 1.001).fits
    assert not _played(stack, memory=enough * 0.999).fits
    assert _played(replace(stack, pool=0.0)).above_peak
    line = " ".join(_limits(found).split())
    assert f"lie beside the stack's pool of {stack.pool:g})" in line


def test_a_pool_has_no_more_than_driver_and_framework_leave() -> None:
    stack = load_stack("maxtext-slurm")
    whole, without = (_played(replace(stack, pool=one)) for one in (1.0, 0.0))
    assert whole.memory_limit == without.memory_limit
    other = dataclasses.replace(_played(stack), stack=replace(stack, pool=0.97))
    assert "are for driver and framework)" in " ".join(_limits(other).split())
    machine = load_profile("cpu-2core")
    on_cpu = as_used(machine, replace(stack, pool=0.5), MODEL, JOB)
    assert on_cpu.memory_limit() == machine.memory_limit(), (
        "only a GPU's allocator takes its memory at the start"
    )


def test_a_pool_without_room_is_refused_by_its_own_name() -> None:
    with pytest.raises(
        SpecError, match=r"stack\.pool: 1e-300 leaves tensors not a byte of the 74\.51 GiB of"
    ):
        _played(replace(load_stack("maxtext-slurm"), pool=1e-300))
