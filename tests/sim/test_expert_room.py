"""Rows of experts in tensors with room for more, by the buffers that a published log prints; what a forward
that is woven with a backward holds."""

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.graph.tape import Tape, Value
from mopsim.program.context import make_context
from mopsim.program.lower import passes_of
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Dispatcher, MatmulDType, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import small
from tests.software import changed

replace = msgspec.structs.replace
JOB = TrainSpec(seq_len=4096, global_batch=64, routing="balanced")
ROWS = 2 * 4096 * 8
"""Of a rank in each layer: two sequences, eight experts for each token."""


def _layer(plan: Strategy, name: str, stack: str = "megatron-bridge-graph") -> Tape:
    plan = replace(plan, stack=stack, micro_batch=2)
    return passes_of(make_context(load_model(name), plan, JOB, 64, load_stack(stack))).tape(5)


def _kept(tape: Tape) -> dict[str, Value]:
    return {name: tape.values[name] for name in tape.kept if name in tape.values}


@pytest.mark.parametrize(
    ("matmul", "dispatcher", "up", "gate", "down"),
    [
        ("compute", "alltoall", 1.0, 1.0, 1.0), ("compute", "hybridep", 1.5, 1.5, 1.5),
        ("mxfp8", "hybridep", 1.2, 1.2, 1.5),
    ],
)  # fmt: skip
def test_rows_have_room_and_those_of_products_in_8_bits_a_stash(
    matmul: MatmulDType, dispatcher: Dispatcher, up: float, gate: float, down: float
) -> None:
    plan = megatron(32, expert_parallel=32, token_dispatcher=dispatcher, recompute="none")
    kept = _kept(_layer(replace(plan, precision=replace(plan.precision, matmul=matmul)), "qwen3_235b_a22b"))
    cast, each = ("_in", 33 / 32) if matmul == "mxfp8" else ("", 2)
    first = kept["experts_up_in" if cast else "rows"].bytes
    last = kept["experts_down_in" if cast else "act"].bytes
    assert first == pytest.approx(up * ROWS * 4096 * each)
    assert kept["gate_up"].bytes == pytest.approx(gate * ROWS * 2 * 1536 * 2)
    assert last == pytest.approx(down * ROWS * 1536 * each)


def test_room_is_for_a_balanced_load_whatever_was_measured() -> None:
    """Of measured loads a rank keeps its own layers' rows, not those of the busiest; room is fixed."""
    model, stack = load_model("qwen3_30b_a3b"), load_stack("megatron-bridge-graph")
    plan = replace(
        megatron(8, expert_parallel=8, token_dispatcher="hybridep", micro_batch=2), stack=stack.name
    )
    busy = model.num_local_experts // 8
    loads = [5.0] * busy + [1.0] * (model.num_local_experts - busy)
    peaks = {
        simulate(model, load_profile("gb200-186g"), 2, plan, replace(JOB, routing=routing), stack).peak_memory
        for routing in ("balanced", tuple(load / sum(loads) for load in loads))
    }
    assert len(peaks) == 1


def test_a_stash_is_as_large_as_a_log_prints() -> None:
    """Hy3, whose experts are as wide as this network's: 8,921,088 rows of 4,096 bytes, scales among them, and
    8,650,752 of 3,072 in bf16, for 110 layers of microbatches (allocate_stash_buffers in
    tl_E1_qwen3_style.log)."""
    plan = megatron(32, expert_parallel=32, token_dispatcher="hybridep", recompute="none")
    kept = _kept(_layer(replace(plan, precision=replace(plan.precision, matmul="mxfp8")), "qwen3_235b_a22b"))
    assert 110 * kept["experts_up_in"].bytes == pytest.approx(8_921_088 * 4096, rel=1e-6)
    assert 110 * kept["gate_up"].bytes == pytest.approx(8_650_752 * 3072 * 2, rel=1e-6)


def test_a_gate_of_its_own_passes_over_all_the_room() -> None:
    """By passes over its output: 9 where halves lie in turns and 20 back, 1.5 times."""
    plan = megatron(32, expert_parallel=32, token_dispatcher="hybridep", recompute="none", micro_batch=2)
    stack = load_stack("megatron-bridge-graph")
    stack = replace(stack, kernels=replace(stack.kernels, expert_rows="interleaved"))
    tape = passes_of(make_context(load_model("qwen3_235b_a22b"), plan, JOB, 64, stack)).tape(5)
    (gate,) = (kernel for kernel in tape.kernels if kernel.name == "experts_act")
    assert gate.saves == ("gate_up",)
    assert gate.bytes == pytest.approx(1.5 * 9 * ROWS * 1536 * 2)
    assert gate.back_bytes == pytest.approx(1.5 * 20 * ROWS * 1536 * 2)


@pytest.mark.parametrize(("matmul", "within"), [("mxfp8", True), ("fp8", False)])
def test_a_gate_in_mxfp8_is_within_the_products(matmul: MatmulDType, within: bool) -> None:
    """With the casts of the second product's input and of the first one's gradient."""
    plan = megatron(32, expert_parallel=32, token_dispatcher="hybridep", recompute="none")
    tape = _layer(replace(plan, precision=replace(plan.precision, matmul=matmul)), "qwen3_235b_a22b")
    found = {kernel.name: kernel for kernel in tape.kernels}
    gate = found["experts_act"]
    assert (gate.bytes == gate.launches == 0) == within
    assert found["experts_down"].casts == found["experts_up"].back_casts == (not within)
    assert found["experts_up"].casts
    assert found["experts_down"].back_casts


@pytest.mark.parametrize("woven", [False, True])
def test_shared_experts_output_stays_where_another_pass_comes_between(woven: bool) -> None:
    """megatron/core/models/gpt/fine_grained_callables.py (Megatron-LM d0b3b775): node.detach(
    shared_expert_output) keeps it with the attention's node."""
    plan = megatron(32, expert_parallel=32, token_dispatcher="hybridep", recompute="none")
    plan = replace(plan, overlap=replace(plan.overlap, experts=woven))
    kept = _kept(_layer(plan, "deepseek_v3", "megatron-bridge-hybridep"))
    assert ("shared_f" in kept) == woven


def test_megatron_fsdp_has_shards_of_gradients_for_good() -> None:
    training = TrainSpec(seq_len=64, global_batch=2)
    made, there = (
        simulate(
            small(), load_profile("h100-sxm-80g"), 1, fsdp2(world_size=2), training,
            changed("megatron-fsdp", sharding={"zero_grad": how}),
        )
        for how in ("fills", "buffers")
    )  # fmt: skip
    shards = there.resident_memory - made.resident_memory
    assert shards == pytest.approx(made.highest_by_category["grads"], rel=0.01)
    assert there.highest_by_category["grads"] == shards
