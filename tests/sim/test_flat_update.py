"""DeepSpeed's ZeRO by hand: whole sums, reductions that are waited for, an update of flat tensors."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.engine import SimResult, run
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.data_parallel import checked, grad_passes, reduction
from mopsim.program.stage import Stage
from mopsim.program.workload import SLOT, Program
from mopsim.spec.hides import Hides
from mopsim.spec.sharding import Sharding
from mopsim.spec.stack import Kernels, Stack, StateDTypes
from mopsim.spec.strategy import Overlap, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import zero_offload
from tests.sim.toys import machine, small

MODEL = small(
    num_hidden_layers=4, first_k_dense_replace=4, num_local_experts=0, num_experts_per_tok=0,
    moe_intermediate_size=0, shared_expert_intermediate_size=0, num_nextn_predict_layers=0,
)  # fmt: skip
TRAINING = TrainSpec(seq_len=32, global_batch=16)
WAYS = {"reductions": "asked", "zero_grad": "copied", "update_group": 1e9}


def _stack(adamw: str = "fused", **sharding: Any) -> Stack:
    kernels = Kernels(adamw=adamw)  # type: ignore[arg-type]
    return Stack(name="mine", kernels=kernels, sharding=Sharding(**(WAYS | sharding)), dtypes=StateDTypes())


def _strategy(zero: int, *, hidden: bool | None = False) -> Strategy:
    """Of four ranks on two microbatches each."""
    made = zero_offload(4)
    optimizer = replace(made.optimizer, state_tier="device", update_on="device")
    dense = replace(made.dense, zero=zero, fsdp=4, reshard_after_forward=zero == 3, prefetch=int(zero == 3))
    narrow = dict.fromkeys(("param", "grad", "reduce"), "bfloat16")
    precision = replace(made.precision, **narrow, master="float32", moments="float32")
    return replace(
        made, dense=dense, optimizer=optimizer, precision=precision, overlap=Overlap(grad_reduce=hidden)
    )


def _program(stack: Stack, zero: int) -> Program:
    return lower(MODEL, _strategy(zero), TRAINING, 8, stack).programs[0]


def _played(stack: Stack, strategy: Strategy) -> SimResult:
    workload = lower(MODEL, strategy, TRAINING, 8, stack)
    return run(workload, MODEL, machine(), strategy, TRAINING)


def _highest(program: Program, category: str, name: str) -> int:
    """Bytes of a category at most in the first op of a name."""
    there = sum(size for kind, size in program.resident if kind == category)
    for op in program.ops:
        if op.name == name:
            return there + dict(op.peak).get(SLOT[category], 0)
        there += dict(op.net).get(SLOT[category], 0)
    raise AssertionError(name)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_all_ranks_sum_whole_gradients_below_zero_3(zero: int) -> None:
    context = make_context(MODEL, _strategy(zero), TRAINING, 8, _stack(sums="whole"))
    kinds = {work.kind for _, work in reduction(context, Stage(context, 0).units)}
    assert kinds == {"reduce_scatter" if zero == 3 else "all_reduce"}


def test_gradients_larger_than_a_buffer_are_scaled_where_they_lie() -> None:
    units = Stage(make_context(MODEL, _strategy(2), TRAINING, 8, _stack()), 0).units
    total, largest = sum(unit.numel for unit in units), max(unit.largest for unit in units)
    large = sum(unit.numel for unit in units if unit.largest == largest)
    for room, size in ((2 * largest, 12 * total), (2 * largest - 1, 12 * (total - large) + 4 * large)):
        stack = _stack(grad_passes=12, reduce_buffer=room)
        (work,) = grad_passes(make_context(MODEL, _strategy(2), TRAINING, 8, stack), units)
        assert work.bytes == size


@pytest.mark.parametrize("zero", [2, 3])
def test_compute_waits_for_reductions_that_nobody_hides(zero: int) -> None:
    shown, hidden = (_played(_stack(), _strategy(zero, hidden=hides)) for hides in (False, True))
    kind = "reduce_scatter"
    assert shown.busy[kind] == pytest.approx(hidden.busy[kind])
    assert shown.exposed[kind] == pytest.approx(shown.busy[kind])
    assert hidden.step_time < shown.step_time
    beside = _played(_stack(reductions="hidden"), _strategy(zero))
    assert beside.step_time == pytest.approx(hidden.step_time)


def test_a_program_may_hide_reductions_of_zero_3_alone() -> None:
    stack = replace(_stack(), hides=Hides(grad_reduce="zero3"))
    found = [stack.resolve(_strategy(zero, hidden=None)).overlap.grad_reduce for zero in (1, 2, 3)]
    assert found == [False, False, True]


@pytest.mark.parametrize("zero", [1, 2])
def test_a_rank_puts_its_gradients_together_before_they_are_cast(zero: int) -> None:
    """flatten(averaged_gradients).to(float32): its own, one flat tensor, its wide copy; others are gone."""
    program = _program(_stack(), zero)
    mine = sum(Stage(make_context(MODEL, _strategy(zero), TRAINING, 8, _stack()), 0).updated)
    assert _highest(program, "grads", "main gradients") == pytest.approx((2 + 2 + 4) * mine, rel=1e-3)


def test_zero_3_puts_the_gradients_of_one_group_together() -> None:
    context = make_context(MODEL, _strategy(3), TRAINING, 8, _stack())
    mine, group = sum(Stage(context, 0).updated), 1000
    program = _program(_stack(update_group=group), 3)
    assert _highest(program, "grads", "main gradients") == 2 * mine + (2 + 4) * group


@pytest.mark.parametrize("zero", [1, 2])
def test_narrow_gradients_are_gone_when_flat_tensors_are_updated(zero: int) -> None:
    program = _program(_stack("looped"), zero)
    context = make_context(MODEL, _strategy(zero), TRAINING, 8, _stack())
    mine = sum(Stage(context, 0).updated)
    assert _highest(program, "grads", "adamw") == pytest.approx(4 * mine, rel=1e-3)
    grown = _highest(program, "optimizer", "adamw") - _highest(program, "optimizer", "norm")
    assert grown == 2 * 4 * mine, "the roots of all and their quotient"


def test_zero_3_updates_groups_one_after_the_other() -> None:
    context = make_context(MODEL, _strategy(3), TRAINING, 8, _stack())
    mine, group = sum(Stage(context, 0).updated), 1000
    assert mine > group
    program = _program(_stack("looped", update_group=group), 3)
    assert _highest(program, "grads", "adamw") == 2 * mine + 4 * group, "shards' gradients stay"
    grown = _highest(program, "optimizer", "adamw") - _highest(program, "optimizer", "norm")
    assert grown == 2 * 4 * group


def test_one_tensor_after_the_other_has_copies_of_the_largest() -> None:
    program = _program(_stack("looped", update_group=0), 2)
    context = make_context(MODEL, _strategy(2), TRAINING, 8, _stack())
    largest = max(-(-unit.largest // unit.shard) for unit in Stage(context, 0).units)
    grown = _highest(program, "optimizer", "adamw") - _highest(program, "optimizer", "norm")
    assert grown == 2 * 4 * largest


def test_a_norm_of_copies_in_fp64_by_hand() -> None:
    plain, wide = (
        next(op for op in _program(_stack(norm_passes=passes), 2).ops if op.name == "norm").work[0].bytes
        for passes in (0, 18)
    )
    assert wide == plain * 18 / 4


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_rank_checks_what_it_updates_tensor_by_tensor(zero: int) -> None:
    """get_grad_norm_direct and has_overflow_partitioned_grads_serial, beside the averaged gradients."""
    stage = Stage(make_context(MODEL, _strategy(zero), TRAINING, 8, _stack()), 0)
    mine, largest = sum(stage.updated), max(unit.largest for unit in stage.units)
    free, checked = (
        _highest(_program(_stack(check_copies=copies), zero), "grads", "main gradients")
        for copies in (0.0, 1000.0)
    )
    if zero == 3:
        assert checked == free, "checked in pieces (stage3.py, _constant_buffered_norm2)"
    else:
        there = sum(unit.padded if zero == 1 else unit.shard_numel for unit in stage.units)
        assert checked == pytest.approx(2 * there + 1000 * min(mine, largest), rel=1e-4)


def _sent(zero: int) -> Strategy:
    """Gradients go to the host, which updates."""
    made = _strategy(zero)
    optimizer = replace(made.optimizer, state_tier="host", update_on="host")
    return replace(made, dense=replace(made.dense, grad_tier="host"), optimizer=optimizer)


def _checks(strategy: Strategy, *, sent: bool, **changes: str) -> float:
    strategy = replace(strategy, precision=replace(strategy.precision, **changes))
    ways = {"check_copies": 8.0, "search_copies": 7.0, "searched": "scaled", "microbatch_grads": "kept"}
    return checked(make_context(MODEL, strategy, TRAINING, 8, _stack(**ways)), sent=sent)


@pytest.mark.parametrize("zero", [1, 2])
def test_what_a_check_copies_is_of_dtypes(zero: int) -> None:
    """stage_1_and_2.py: a norm in fp64; in fp16, and as it goes to the host, x.float() and seven bytes."""
    strategy = _strategy(zero)
    half = dict.fromkeys(("compute", "param", "grad", "reduce"), "float16")
    assert _checks(strategy, sent=False) == 8
    assert _checks(strategy, sent=True) == 11
    assert _checks(strategy, sent=False, **half) == 11
    kept = 0 if zero == 1 else 8  # BF16_Optimizer has no search, and its norm copies no fp32
    assert _checks(strategy, sent=zero == 2, grad="float32", reduce="float32") == kept
    always = _stack(check_copies=8.0, search_copies=7.0)
    assert checked(make_context(MODEL, strategy, TRAINING, 8, always), sent=False) == 11
    before = _stack(check_copies=8.0)
    assert checked(make_context(MODEL, strategy, TRAINING, 8, before), sent=True) == 8


def test_gradients_that_go_to_the_host_are_checked_whole_as_they_are_reduced() -> None:
    """async_inplace_copy_grad_to_fp32_buffer_from_gpu and what is before it, of each reduced gradient."""
    strategy = _sent(2)
    context = make_context(MODEL, strategy, TRAINING, 8, _stack())
    largest = {unit.name: unit.largest for unit in Stage(context, 0).units}
    rooms = {f"flat gradient {name}": 11 * largest[name] for name in ("head", "embedding")} | {"norm": 0}
    bare = _stack(grad_passes=12.0)
    full = _stack(grad_passes=12.0, check_copies=8.0, search_copies=7.0, host_room=2.0)
    free, held = (lower(MODEL, strategy, TRAINING, 8, stack).programs[0] for stack in (bare, full))
    for name, room in rooms.items():
        more = _highest(held, "framework", name) - _highest(free, "framework", name)
        assert more == 2 * max(largest.values()) + room
    assert _highest(held, "grads", "norm") == _highest(free, "grads", "norm"), "checked before, as they went"


def test_zero_3_sends_gradients_to_the_host_without_a_buffer_of_the_largest() -> None:
    """temp_grad_buffer_for_gpu_offload is of stage_1_and_2.py."""
    free, held = (
        lower(MODEL, _sent(3), TRAINING, 8, _stack(host_room=room)).programs[0].resident
        for room in (0.0, 2.0)
    )
    assert held == free
