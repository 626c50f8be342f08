"""Delayed scales by hand: kernels that update them in each pass of a layer, what ends a chunk's pass."""

from collections import Counter

from msgspec.structs import replace

from mopsim.program import lower
from mopsim.program.workload import Program
from mopsim.spec.stack import Kernels, Stack
from mopsim.spec.strategy import MatmulDType
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron
from tests.sim.toys import small

MODEL = small(
    num_hidden_layers=4, first_k_dense_replace=4, num_local_experts=0, num_experts_per_tok=0,
    moe_intermediate_size=0, shared_expert_intermediate_size=0, num_nextn_predict_layers=0,
)  # fmt: skip
MICROBATCHES = 2


def _program(kernels: Kernels, matmul: MatmulDType = "fp8") -> Program:
    """The first of two stages of two layers, on four ranks each: two of tensor, two of data parallelism."""
    made = megatron(8, tensor_parallel=2, pipeline_parallel=2)
    strategy = replace(made, precision=replace(made.precision, matmul=matmul))
    training = TrainSpec(seq_len=32, global_batch=2 * MICROBATCHES)
    return lower(MODEL, strategy, training, 4, Stack(name="mine", kernels=kernels)).programs[0]


def _launches(program: Program) -> int:
    works = (work for op in program.ops for work in op.work if work.kind == "memory_bound")
    return sum(work.launches for work in works)


def test_each_pass_of_a_layer_updates_its_scales() -> None:
    plain, updated = _program(Kernels()), _program(Kernels(scale_updates=16))
    assert _launches(updated) - _launches(plain) == 16 * 2 * 2 * MICROBATCHES
    narrow = _program(Kernels(scale_updates=16, scale_sums="world"), "bfloat16")
    assert narrow == _program(Kernels(), "bfloat16")


def test_ranks_agree_on_scales_at_the_end_of_a_chunks_pass() -> None:
    program = _program(Kernels(scale_sums="world"))
    sums = [(place, op) for place, op in enumerate(program.ops) if op.name == "scales"]
    assert Counter(op.phase for _, op in sums) == {"forward": MICROBATCHES, "backward": MICROBATCHES}
    assert {op.work[0].bytes for _, op in sums} == {4.0 * 12 * 2, 4.0 * 8 * 2}  # of two layers, in fp32
    assert {op.work[0].group.size for _, op in sums} == {4}
    sent = next(op for op in program.ops if op.name == "send forward")
    assert sums[0][0] in sent.deps
    tensor = _program(Kernels(scale_sums="tensor"))
    assert {op.work[0].group.size for op in tensor.ops if op.name == "scales"} == {2}
