"""Chunked experts and the ring loss under programs with autograd: the same work, less memory at a time."""

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.program import lower
from mopsim.program.workload import Workload
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.property.drawn import short

replace = msgspec.structs.replace
MODEL, TRAINING = short("qwen3_30b_a3b"), TrainSpec(seq_len=32768, global_batch=8)
STACKS = ("megatron-core", "mopexec-fsdp2", "torchtitan", "deepspeed", "generic-eager")


def chunked(strategy: Strategy, chunks: int) -> Strategy:
    tokens = TRAINING.tokens_per_rank(strategy)
    size = -(-tokens // chunks) if chunks > 1 else 0
    return replace(strategy, experts=replace(strategy.experts, chunk_tokens=size))


def on(stack: str) -> Strategy:
    family = (
        megatron(8, expert_parallel=8, recompute="full")
        if "megatron" in stack
        else fsdp2(8, expert_parallel=8)
    )
    return replace(family, stack=stack)


def flops(workload: Workload) -> dict[str, float]:
    """FLOP of products by phase."""
    found: dict[str, float] = {}
    for program in workload.programs:
        for op in program.ops:
            for work in op.work:
                if work.kind in ("matmul", "grouped_matmul"):
                    done = 2 * work.m * work.n * work.k * work.count * op.times
                    found[op.phase] = found.get(op.phase, 0.0) + done
    return found


@pytest.mark.parametrize("stack", STACKS)
def test_chunks_do_the_work_of_the_whole(stack: str) -> None:
    whole, parts = (flops(lower(MODEL, chunked(on(stack), n), TRAINING, 8)) for n in (1, 4))
    for phase in ("forward", "backward"):  # a checkpoint of chunks ends with what their backward starts from
        assert parts[phase] == pytest.approx(whole[phase], rel=1e-9), phase
    assert 0.5 * whole.get("recompute", 0.0) < parts.get("recompute", 1.0) <= whole.get("recompute", 1.0)


@pytest.mark.parametrize("stack", STACKS)
def test_chunks_take_less_memory(stack: str) -> None:
    """At most four are on their way: two sent, one multiplied, one on its way back."""
    hardware = load_profile("h200-sxm-141g")
    steps = [simulate(MODEL, hardware, 1, chunked(on(stack), n), TRAINING) for n in (1, 4, 8)]
    dispatch = [step.highest_by_category["dispatch"] for step in steps]
    assert dispatch[2] < dispatch[1] < dispatch[0]
    assert dispatch[2] <= 0.5 * dispatch[0]
    assert steps[2].peak_memory <= steps[0].peak_memory


def test_without_recomputation_all_chunks_are_kept() -> None:
    hardware = load_profile("h200-sxm-141g")
    strategy = megatron(8, expert_parallel=8, recompute="none")
    kept = [simulate(MODEL, hardware, 1, chunked(strategy, n), TRAINING) for n in (1, 4)]
    assert kept[1].peak_memory == pytest.approx(kept[0].peak_memory, rel=0.1)


def test_exchanges_run_beside_the_products_of_other_chunks() -> None:
    hardware = load_profile("h200-sxm-141g")
    whole, parts = (simulate(MODEL, hardware, 1, chunked(on("megatron-core"), n), TRAINING) for n in (1, 2))
    assert parts.exposed["all_to_all"] < 0.8 * whole.exposed["all_to_all"]


@pytest.mark.parametrize("stack", STACKS)
def test_a_ring_of_vocabulary_shards_under_every_stack(stack: str) -> None:
    """In a fork of the program that has one: logits of one shard and strip at once; every rank's tokens meet
    all rows of the head, twice."""
    hardware, plain = load_profile("h200-sxm-141g"), on(stack)
    ring = replace(
        plain, vocabulary=replace(plain.vocabulary, loss="ring", vocab_parallel=8, chunk_tokens=1024)
    )
    full = replace(plain, vocabulary=replace(plain.vocabulary, loss="full", vocab_parallel=1, chunk_tokens=0))
    fork = replace(load_stack(stack), has={})
    first, second = (simulate(MODEL, hardware, 1, one, TRAINING, fork) for one in (full, ring))
    assert second.highest_by_category["logits"] < 0.1 * first.highest_by_category["logits"]
    done = [sum(flops(lower(MODEL, one, TRAINING, 8, fork)).values()) for one in (full, ring)]
    again = 2 * TRAINING.tokens_per_rank(plain) * MODEL.hidden_size * MODEL.vocab_size
    assert done[1] == pytest.approx(done[0] + again, rel=1e-3)


def test_stages_and_regions_take_chunks_and_rings() -> None:
    strategy = megatron(8, tensor_parallel=2, pipeline_parallel=2, expert_parallel=2, recompute="full")
    vocabulary = replace(strategy.vocabulary, loss="ring", vocab_parallel=4, chunk_tokens=1024)
    whole = replace(strategy, vocabulary=vocabulary)
    hardware = load_profile("h200-sxm-141g")
    fork = replace(load_stack("megatron-core"), has={})
    steps = [simulate(MODEL, hardware, 1, chunked(whole, n), TRAINING, fork) for n in (1, 4)]
    assert steps[1].highest_by_category["dispatch"] <= 0.5 * steps[0].highest_by_category["dispatch"]


@pytest.mark.parametrize("stack", ["mopexec-flat", "deepspeed", "megatron-core"])
def test_gathered_parameters_may_stay_under_every_stack(stack: str) -> None:
    """One gather of each unit in a microbatch instead of two, and more memory."""
    strategy = replace(fsdp2(8, expert_parallel=8, recompute="full"), stack=stack)
    optimizer = replace(strategy.optimizer, update_on="device")
    strategy = replace(strategy, optimizer=optimizer)
    kept = replace(strategy, dense=replace(strategy.dense, reshard_after_forward=False))

    def gathers(one: Strategy) -> int:
        (program,) = lower(MODEL, one, TRAINING, 8, load_stack(stack), expand=True).programs
        return sum(op.name.startswith("gather layers") for op in program.ops)

    assert gathers(kept) == MODEL.num_hidden_layers * TRAINING.num_microbatches(kept)
    hardware = load_profile("h200-sxm-141g")
    more, less = (simulate(MODEL, hardware, 1, one, TRAINING) for one in (kept, strategy))
    assert more.highest_by_category["gathered"] > less.highest_by_category["gathered"]
    assert gathers(strategy) > gathers(kept)
