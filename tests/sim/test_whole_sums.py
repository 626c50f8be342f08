"""Gradients summed whole until the last microbatch; rows of experts padded to the busiest; torch's loss on
logits as they are; an embedding that is not split."""

import pytest
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.engine.simulate import run
from mopsim.graph import total_params
from mopsim.graph.experts import dispatch, experts
from mopsim.graph.rewrites.padded import padded_to_busiest
from mopsim.program import lower
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.toys import machine, small
from tests.software import changed, unfused


def summed(when: str = "always") -> Stack:
    return changed("torchtitan", sharding={"whole_sums": when})


def training(microbatches: int) -> TrainSpec:
    return TrainSpec(seq_len=64, global_batch=8 * microbatches)


def test_only_the_last_microbatch_reduces() -> None:
    ops = lower(small(), fsdp2(8), training(4), 8, stack=summed()).programs[0].ops
    last = max(op.microbatch for op in ops)
    assert {op.microbatch for op in ops if op.name.startswith("reduce ")} == {last}
    assert {op.microbatch for op in ops if op.name.startswith("sum ")} == set(range(last + 1))


@pytest.mark.parametrize("reshards", [False, True])
@pytest.mark.parametrize("when", ["never", "always"])
def test_parameters_stay_from_a_backward_to_the_next_pass(when: str, reshards: bool) -> None:
    """They are gathered once a step, or, freed after each forward, for the first one and each backward."""
    stack = changed("torchtitan", sharding={"whole_sums": "always", "stays": when})
    strategy = fsdp2(8, reshard_after_forward=reshards)
    ops = lower(small(), strategy, training(4), 8, stack=stack).programs[0].ops
    many = 1 + max(op.microbatch for op in ops)
    gathers = [op for op in ops if op.name == "gather layers.1.dense"]
    stayed = many + 1 if reshards else 1
    assert len(gathers) == (stayed if when == "always" else many * (1 + reshards))


def test_what_stays_is_freed_by_the_last_backward() -> None:
    stack = changed("torchtitan", sharding={"whole_sums": "always", "stays": "always"})
    results = [
        simulate(small(), machine(), 1, fsdp2(8, reshard_after_forward=False), training(many), stack)
        for many in (1, 2, 5)
    ]
    once, *more = (found.highest_by_category["gathered"] for found in results)
    assert set(more) == {once}


def test_the_first_sum_in_the_products_dtype_copies_nothing() -> None:
    """Its hooks take the host what a later one's do, which adds each gradient in a kernel of its own."""
    found = {}
    for reduce in ("bfloat16", "float32"):
        strategy = fsdp2(8)
        strategy = replace(strategy, precision=replace(strategy.precision, reduce=reduce, grad=reduce))
        ops = lower(small(), strategy, training(3), 8, stack=summed()).programs[0].ops
        works = [op.work[0] for op in ops if op.name.startswith("sum layers.1")]
        found[reduce] = [(bool(work.bytes), work.launches > 1) for work in works]
        assert len({work.issued + work.host for work in works}) == 1
    assert found == {"bfloat16": [(False, False), *2 * [(True, True)]], "float32": 3 * [(True, True)]}


def test_whole_sums_are_there_in_fp32_and_are_gone_at_the_end() -> None:
    for microbatches, whole in ((1, False), (2, True), (5, True)):
        stacks = summed(), summed("never")
        both = (simulate(small(), machine(), 1, fsdp2(8), training(microbatches), one) for one in stacks)
        kept, plain = (found.highest_by_category["gathered_grads"] for found in both)
        assert (kept >= 4 * total_params(small())) == whole
        assert (kept == plain) != whole


@pytest.mark.parametrize("strategy", [fsdp2(8), fsdp2(8, expert_parallel=4)], ids=["dense", "experts"])
def test_microbatches_that_are_not_played_sum_too(strategy: Strategy) -> None:
    model, job = small(), training(6)
    short, every = (
        run(
            lower(model, strategy, job, 8, stack=summed(), expand=expand),
            model, machine(), strategy, job,
        )
        for expand in (False, True)
    )  # fmt: skip
    assert short.step_time == pytest.approx(every.step_time, rel=1e-9)
    assert short.peak_memory == every.peak_memory


def test_pipelines_alone_may_sum_whole() -> None:
    job = training(4)
    for stages, found in ((1, False), (2, True)):
        strategy = fsdp2(8)
        pipeline = replace(strategy.pipeline, pipeline_parallel=stages)
        dense = replace(strategy.dense, fsdp=8 // stages)
        experts = replace(strategy.experts, expert_fsdp=8 // stages)
        strategy = replace(strategy, pipeline=pipeline, dense=dense, experts=experts)
        ops = lower(small(), strategy, job, 8, stack=summed("pipelines")).programs[0].ops
        assert any(op.name.startswith("sum ") for op in ops) == found


def test_padded_experts_compute_the_busiest_ones_rows() -> None:
    job = TrainSpec(seq_len=1024, global_batch=8, routing="50/1")
    flops = []
    for padding in ("none", "busiest"):
        stack = changed("torchtitan", kernels={"expert_padding": padding})
        ops = lower(small(), fsdp2(8), job, 8, stack=stack).programs[0].ops
        works = [w for op in ops if op.phase == "forward" for w in op.work if w.kind == "grouped_matmul"]
        flops.append(sum(2 * w.m * w.n * w.k * w.count for w in works))
    experts = small().num_local_experts
    assert flops[1] / flops[0] == pytest.approx(experts / 2, rel=0.02)  # half of all rows on one


def test_rows_are_copied_into_zeros_of_the_padded_size() -> None:
    routes, row = (370, 10, 10, 10), small().hidden_size * 2
    sort = dispatch(small(), 50, sum(routes), 2, True).kernels[-1]
    products = experts(small(), routes, 2).kernels
    padded = padded_to_busiest((sort, *products), len(routes))[0]
    assert padded.writes[0].bytes == 4 * 370 * row
    assert padded.bytes == pytest.approx((4 * 370 + 2 * 400) * row)  # zeros; rows read and written
    even = padded_to_busiest((sort, *experts(small(), (100,) * 4, 2).kernels), 4)[0]
    assert even.bytes == pytest.approx(3 * 400 * row)


def test_a_fresh_routers_peak_is_of_a_layer_whose_tokens_all_choose_one_expert() -> None:
    routes = (25,) * 4  # of 50 tokens, two each
    kernels = experts(small(), routes, 2).kernels
    even, most = padded_to_busiest(kernels, 4), padded_to_busiest(kernels, 4, 50)
    assert [one.matmuls for one in even] == [one.matmuls for one in most], "time is of the mean layer"
    for plain, fresh in zip(even, most, strict=True):
        more = 2 if plain.name.startswith("experts_") else 1  # rows as they arrived are no more
        assert [more * value.bytes for value in plain.writes] == [value.bytes for value in fresh.writes]
        assert plain.bytes == fresh.bytes


def test_a_loss_without_a_copy_in_fp32_takes_less() -> None:
    model = replace(small(), vocab_size=32_000)
    # picked: what log_softmax made, its copy in fp32, and the gradient of that copy
    for copy, bytes_each in ((True, 2 + 3 * 4), (False, 2 + 3 * 2), ("picked", 2 + 2 + 2 * 4)):
        kernels = {"loss": "composed", "loss_copy": copy}
        software = unfused("copies", kernels=kernels, sharding={"fsdp": True})
        job = TrainSpec(seq_len=1024, global_batch=8)
        found = simulate(model, machine(), 1, fsdp2(8), job, software)
        assert found.highest_by_category["logits"] == 1024 * 32_000 * bytes_each


def test_an_embedding_that_tensor_ranks_do_not_split_is_whole_on_each() -> None:
    strategy, job = fsdp2(8, tensor_parallel=2), training(1)
    found = []
    for where in ("split", "whole"):
        stack = changed("torchtitan", sharding={"embedding": where})
        (program,) = lower(small(), strategy, job, 8, stack=stack).programs
        sums = [
            w for op in program.ops if op.name == "embedding" for w in op.work if w.kind == "reduce_scatter"
        ]
        params = sum(size for category, size in program.resident if category == "params")
        found.append((params, len(sums)))
    (split, summed), (whole, alone) = found
    half = 4 * small().vocab_size * small().hidden_size / 2 / strategy.dense.fsdp
    assert whole - split == pytest.approx(half, rel=0.01)
    assert summed > 0 == alone


def test_a_program_without_fsdp_sums_as_it_did() -> None:
    stack = load_stack("kempnerforge")
    assert stack.under(0).sharding.whole_sums == "never"
    assert stack.under(3).sharding.whole_sums == "always"
