"""Weight gradients of experts that are made beside the exchange of their inputs' gradients."""

import msgspec

from mopsim.program.lower import lower
from mopsim.program.workload import Op
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

replace = msgspec.structs.replace


def of_experts(delayed: bool) -> list[Op]:
    """The backward of one layer's experts, woven with another microbatch's forward."""
    stack = load_stack("megatron-core")
    stack = replace(stack, host=replace(stack.host, delayed_grads=delayed))
    made = megatron(8, expert_parallel=8)
    made = replace(made, overlap=replace(made.overlap, experts=True))
    training = TrainSpec(seq_len=1024, global_batch=32)
    ops = lower(load_model("qwen3_30b_a3b"), made, training, stack=stack).programs[0].ops
    mine = [op for op in ops if (op.component, op.phase, op.microbatch) == ("experts", "backward", 0)]
    return [op for op in mine if op.layer == mine[0].layer]


def test_they_are_made_once_the_exchange_has_begun() -> None:
    whole, halves = of_experts(False), of_experts(True)
    assert len(halves) == len(whole) + 1
    first, late = (
        op for op in halves if op.stream == "compute" and any(w.kind == "grouped_matmul" for w in op.work)
    )
    sent = next(op for op in halves if op.name == "dispatch")
    assert first.index in sent.deps
    assert late.index not in sent.deps
    assert late.index < sent.index, "as the host starts them"


def test_both_halves_are_the_whole() -> None:
    def work(ops: list[Op]) -> list[tuple[float, ...]]:
        return sorted((w.m, w.n, w.k) for op in ops for w in op.work if w.kind == "grouped_matmul")

    def left(ops: list[Op]) -> int:
        return sum(size for op in ops for _, size in op.net)

    whole, halves = of_experts(False), of_experts(True)
    assert work(whole) == work(halves)
    assert left(whole) == left(halves)
