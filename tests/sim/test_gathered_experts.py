"""Experts whose ranks gather all tokens (Megatron-Core's allgather dispatcher)."""

import msgspec
import pytest

from mopsim.graph.gathered import GROUP
from mopsim.graph.tape import Kernel
from mopsim.program import lower
from mopsim.program.context import Context, make_context
from mopsim.program.lower import passes_of
from mopsim.program.works import works
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Dispatcher
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

MODEL = load_model("qwen3_30b_a3b")
JOB = TrainSpec(seq_len=4096, global_batch=32, routing="balanced")
TOKENS, H, E, K = 4096, 2048, 128, 8
replace = msgspec.structs.replace


def context(
    dispatcher: Dispatcher = "allgather", *, expert_parallel: int = 4, tensor: int = 1, parts: int = 1
) -> Context:
    strategy = megatron(
        8, tensor_parallel=tensor, expert_parallel=expert_parallel, expert_tensor_parallel=parts,
        token_dispatcher=dispatcher, recompute="none",
    )  # fmt: skip
    stack = load_stack("megatron-lm")
    return make_context(MODEL, replace(strategy, stack=stack.name), JOB, 4, stack)


def kernels(made: Context) -> dict[str, Kernel]:
    return {one.name: one for one in passes_of(made).tape(5).kernels}


@pytest.mark.parametrize(("tensor", "parts"), [(1, 1), (2, 1), (2, 2)])
def test_all_tokens_come_once_and_sums_leave_in_the_routers_dtype(tensor: int, parts: int) -> None:
    """Over all ranks that split experts, tensor ranks among them: rows in bf16, probabilities and a map of
    all experts, sums in fp32. What is picked are the rows of the rank's experts, or of its parts of them."""
    made = context(tensor=tensor, parts=parts)
    ranks = 4 * parts
    found, everyone = kernels(made), TOKENS // tensor * ranks
    assert made.groups[GROUP].size == ranks
    dispatch, combine, routes = (found[name] for name in ("dispatch", "combine", "all routes"))
    kinds = [(one.kind, one.back_kind, one.group) for one in (dispatch, combine)]
    assert kinds == [("all_gather", "reduce_scatter", GROUP), ("reduce_scatter", "all_gather", GROUP)]
    assert (dispatch.bytes, combine.bytes) == (everyone * H * 2, everyone * H * 4)
    assert (routes.bytes, routes.back_moved) == (everyone * E * 5, everyone * E * 4)
    rows = everyone * K // 4
    assert found["sort"].writes[0].bytes == found["unsort"].bytes / 2 == rows * H * 2
    assert found["experts_up"].matmuls[0].m * found["experts_up"].matmuls[0].count == rows
    assert not {"permute", "gather_rows", "scatter_rows", "all counts", "sent weights"} & found.keys()
    assert not any(one.kind == "all_to_all" for one in found.values())


def test_the_products_are_those_of_rows_that_are_sent() -> None:
    gathers, sends = (kernels(context(dispatcher)) for dispatcher in ("allgather", "alltoall"))
    for name in ("router", "experts_up", "experts_down"):
        assert gathers[name].matmuls == sends[name].matmuls


def test_one_rank_gathers_nothing() -> None:
    assert kernels(context(expert_parallel=1)) == kernels(context("alltoall", expert_parallel=1))


def test_rows_are_picked_by_index_and_added_by_atomic_operations() -> None:
    """Without a fused permutation, on the rank that has them; nothing is cut by expert."""
    made = context()
    found = kernels(made)
    (picked,), (back,) = works(found["sort"], "forward", made), works(found["sort"], "backward", made)
    (added,) = works(found["unsort"], "forward", made)
    rows = TOKENS * K * H
    assert (picked.sums, back.sums, added.sums) == (0.0, rows, rows)
    plain = context("alltoall")
    (sent,) = works(kernels(plain)["sort"], "forward", plain)
    assert 0 < picked.host < sent.host


def test_the_host_reads_counts_of_what_has_come() -> None:
    """tokens_per_expert is of the gathered map; rows that are sent are counted before."""
    order = {}
    for dispatcher in ("allgather", "alltoall"):
        made = context(dispatcher)
        ops = lower(MODEL, made.strategy, JOB, 4, made.stack, compose=False).programs[0].ops
        mine = [op.name for op in ops if (op.layer, op.microbatch, op.phase) == (5, 1, "forward")]
        order[dispatcher] = mine.index("counts read") > mine.index("dispatch")
    assert order == {"allgather": True, "alltoall": False}
