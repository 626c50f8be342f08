"""What products lose to a collective that runs beside them."""

import pytest
from msgspec.structs import replace

from mopsim.cost.stack import as_used
from mopsim.engine import run
from mopsim.engine.beside import beside
from mopsim.engine.record import Record
from mopsim.engine.streams import play
from mopsim.program import lower
from mopsim.program.builder import Builder
from mopsim.program.workload import CommGroup, Program, Work
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import machine, small

GROUPS = {"pair": CommGroup(2, 2)}


def _end(kinds: tuple[str, ...], spares: bool, kernels: str) -> float:
    """A collective of 2 s beside compute of 3 s, of kinds of work alike in time, then compute of 1 s that
    waits for both. A kernel loses half of its rate beside a collective, a product three quarters."""
    builder = Builder(GROUPS)
    sent = Work("all_gather", bytes=1, group=GROUPS["pair"], spares=spares)
    talk = builder.add("talk", "tensor scale_up", "other", "forward", [sent])
    builder.add("long", "compute", "other", "forward", [Work(kind, bytes=1) for kind in kinds])
    builder.add("after", "compute", "other", "forward", [Work("memory_bound", bytes=2)], deps=[talk])
    program, profile = Program(tuple(builder.ops)), machine(share=0.5, products=0.75)
    prices = {id(work): (work, 1.0) for op in program.ops for work in op.work}
    flat = load_stack("mopexec-flat")
    stack = replace(flat, kernels=replace(flat.kernels, expert_products=kernels))
    besides = [beside(program, profile, stack, prices)]
    return play([program], [[2.0, 3.0, 1.0]], [Record(True)], besides, [{}])


@pytest.mark.parametrize(
    ("kinds", "spares", "kernels", "end"),
    [
        (("memory_bound",), False, "grouped", 5.0),
        (("matmul",), False, "grouped", 5.5),
        (("matmul",), True, "grouped", 5.0),
        (("grouped_matmul",), False, "looped", 5.0),
        (("grouped_matmul",), False, "torch", 5.5),
        (("matmul", "memory_bound"), False, "grouped", 4.0 + 2.0 * 2 / 3),  # rates of 1/4 and 1/2 make 1/3
    ],
)
def test_products_may_lose_more_than_other_kernels(
    kinds: tuple[str, ...], spares: bool, kernels: str, end: float
) -> None:
    assert _end(kinds, spares, kernels) == pytest.approx(end)


@pytest.mark.parametrize("name", ["fsdp2", "megatron"])
def test_a_step_is_between_those_of_even_losses(name: str) -> None:
    strategy = fsdp2(8) if name == "fsdp2" else megatron(8, tensor_parallel=2, expert_parallel=4)
    training = TrainSpec(seq_len=512, global_batch=8)
    workload = lower(small(), strategy, training, 8)
    low, mixed, high = (
        run(workload, small(), profile, strategy, training).step_time
        for profile in (machine(share=0.2), machine(share=0.2, products=0.6), machine(share=0.6))
    )
    assert low <= mixed <= high


def test_products_lose_nothing_where_a_stack_says_that_exchanges_take_no_sms() -> None:
    flat, training = load_stack("mopexec-flat"), TrainSpec(seq_len=512, global_batch=8)
    card = machine(share=0.2, products=0.6)
    found = {}
    for share in (None, 0.0, 0.1):
        stack = replace(flat, communication_share={} if share is None else {"default": share})
        used = as_used(card, stack, small(), training)
        found[share] = used.communication_share, used.product_share
    assert found == {None: (0.2, 0.6), 0.0: (0.0, 0.0), 0.1: (0.1, 0.6)}


def test_collectives_in_blocks_beside_products_spare_them() -> None:
    """Transformer Engine leaves the SMs of its user buffers' kernels out of the products beside them."""
    strategy = megatron(8, tensor_parallel=2, expert_parallel=4)
    for hidden in (False, True):
        plan = replace(strategy, overlap=replace(strategy.overlap, tensor=hidden))
        program = lower(small(), plan, TrainSpec(seq_len=512, global_batch=8), 8).programs[0]
        works = [work for op in program.ops for work in op.work]
        assert any(work.spares for work in works) == hidden
