"""What each caller of a search has tried of FSDP2 stays in its space, whatever axes this learns."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import SpecError
from mopsim.context.contenders import Contender, contenders
from mopsim.context.sweep import ContextCase
from mopsim.search.coarse import coarse
from mopsim.search.had import not_played
from mopsim.search.problem import Axes, Problem, divisors
from mopsim.spec.capability import Job, runnable
from mopsim.spec.layout import ceil_div
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.spaces import generate

Change = Callable[[Problem, Axes], Axes]
Ways = dict[str, list[Any]]

MODEL, HARDWARE, BATCH = load_model("olmoe_1b_7b"), load_profile("h200-sxm-141g"), 32
SEQ_LEN = 1024
BEFORE: Ways = {
    "micro_batch": [1, 4],
    "expert_parallel": [1, 4, 16],
    "loss": [("full", 1), ("chunked", 8)],
    "offload": [False, True],
    "recompute": ["full", "none"],
    "reshard_after_forward": [True, False],
}
"""Keywords of `mopsim.fsdp2`, and values that every caller has tried."""
WAYS = ("ulysses", "all_gather", "ring")


def asked(stack: str = "", *, runs: bool = False) -> Problem:
    training = TrainSpec(seq_len=SEQ_LEN, global_batch=BATCH)
    return Problem(MODEL, HARDWARE, 2, training, stack=load_stack(stack) if stack else None, runnable=runs)


def contexts(problem: Problem, tensor: int, most: int) -> list[tuple[int, int, str]]:
    """(tensor, context degree, exchange)."""
    degrees = [one for one in divisors(problem.world_size) if tensor * one <= most]
    return [(tensor, one, way) for one in degrees for way in (WAYS if one > 1 else WAYS[:1])]


def legal(problem: Problem, ways: Ways) -> Iterator[Strategy]:
    """The strategies of every combination of these that a program has."""
    stack, world = problem.software("fsdp2"), problem.world_size
    copies = [world, problem.hardware.devices_per_node]
    for ranks, *values in product(copies, *ways.values()):
        given = dict(zip(ways, values, strict=True))
        tensor, sequence, exchange = given.pop("split")
        given["loss"], slices = given["loss"]
        tokens = problem.training.seq_len * given["micro_batch"] // sequence
        one_mesh = stack.sharding.one_mesh
        try:
            strategy = fsdp2(
                world, **given, tensor_parallel=tensor, context_parallel=sequence, context_exchange=exchange,
                fsdp=ranks // tensor, expert_fsdp=one_mesh * (ranks // given["expert_parallel"]),
                loss_chunk_tokens=ceil_div(tokens, slices),
            )  # fmt: skip
            strategy = stack.resolve(replace(strategy, stack=stack.name))
            strategy.check_model(problem.model)
            problem.training.check_strategy(strategy)
        except SpecError:
            continue
        job = Job(problem.model, strategy, problem.training, stack, problem.hardware)
        runs = not problem.runnable or runnable(strategy, job.model, job.training, stack) is None
        if next(not_played(job), None) is None and runs:
            yield strategy


def kept(problem: Problem, split: list[tuple[int, int, str]], change: Change | None, but: Ways) -> int:
    """How many of these there are, all of which are in the space."""
    space = generate(problem, "fsdp2", change)
    c, ways = space.columns, {**BEFORE, **but, "split": split}
    may = np.isin(c["micro_batch"], ways["micro_batch"]) & np.isin(c["experts"], ways["expert_parallel"])
    may &= (c["pipeline"] == 1) & (c["modules"] == 0) & (c["saved"] == 0) & (c["expert_tensor"] == 1)
    may &= np.isin(c["tensor"], [one[0] for one in split]) & (c["loss_slices"] < 32)
    there = {space.build(int(index)) for index in np.flatnonzero(may)}
    before = set(legal(problem, ways))
    assert before <= there, next(iter(before - there))
    return len(before)


@pytest.mark.parametrize("change", [None, coarse])
@pytest.mark.parametrize(("stack", "runs"), [("", False), ("", True), ("torchtitan", False)])
def test_search_and_size_keep_what_they_tried(stack: str, runs: bool, change: Change | None) -> None:
    problem = asked(stack, runs=runs)
    assert kept(problem, contexts(problem, 1, 16), change, {}) > 100


@pytest.mark.parametrize(
    "one", [one for one in contenders() if one.family == "fsdp2"], ids=lambda one: one.name
)
def test_context_keeps_what_it_tried(one: Contender) -> None:
    """Tensor parallelism with all else, also where a search by itself leaves it out."""
    case, most = ContextCase(MODEL, HARDWARE, 2, SEQ_LEN), int(one.within * 8) or 16
    rules: Ways = {
        "loss": BEFORE["loss"][: 1 + one.chunked],
        "offload": [tier == "host" for tier in one.offload],
    }
    problem = case.problem(one, SEQ_LEN, BATCH)
    split = [each for tensor in (1, 2, 4, 8) for each in contexts(problem, tensor, most)]
    assert kept(problem, split, one.axes, rules) > 50
    once = case.problem(one, SEQ_LEN, problem.world_size // 2)
    shared = [each for each in split if each[0] * each[1] == 2]
    assert kept(once, shared, one.at_once, {**rules, "micro_batch": [1]}) > 10


def test_an_eager_program_is_searched_without_fsdp_too() -> None:
    found = mopsim.search(
        "tiny", "h200-sxm-141g", seq_len=512, global_batch=8, families="megatron", stack="generic-eager",
        budget=4,
    )  # fmt: skip
    assert found.best is not None
    assert found.best.strategy.dense.zero == 1
