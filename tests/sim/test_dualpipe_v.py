"""DualPipeV: the order of its turns, its bubble and what it holds, and programs that play it."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.engine.result import SimResult
from mopsim.program import lower
from mopsim.program.workload import Workload
from mopsim.spec.layout import part_of, stage_layers
from mopsim.spec.pipeline_order import dualpipe_v, order, turns
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Dense, Experts, Overlap, Pipeline, Strategy
from mopsim.spec.training import TrainSpec
from tests.sim.toys import small

unhurried = settings(deadline=None)
MODEL = small(num_hidden_layers=9, first_k_dense_replace=1)
STAGES = st.integers(1, 8)
MORE = st.integers(0, 20)
"""Microbatches beyond the two a stage that the schedule needs."""


def played(stages: int, microbatches: int, cost: dict[str, int], pair: int) -> tuple[int, list[int]]:
    """(end of the last turn, busy time of each stage) of turns that begin once what they need is there."""
    left = [dualpipe_v(stages, microbatches, stage) for stage in range(stages)]
    ends: dict[tuple[str, int, int], int] = {}
    clock, busy = [0] * stages, [0] * stages
    while any(left):
        stage = next(s for s in range(stages) if left[s] and set(needs(left[s][0], s, stages)) <= ends.keys())
        turn = left[stage].pop(0)
        start = max([clock[stage], *(ends[key] for key in needs(turn, stage, stages))])
        took = pair if len(turn) == 2 else cost[turn[0][0]]
        clock[stage], busy[stage] = start + took, busy[stage] + took
        for phase, microbatch, chunk in turn:
            key = "forward" if phase == "forward" else "weight" if phase == "weight_grad" else "backward"
            ends[key, microbatch, part_of(stage, chunk, stages, True)] = clock[stage]
    return max(clock), busy


def needs(turn: tuple[Any, ...], stage: int, stages: int) -> Iterator[tuple[str, int, int]]:
    """What a turn needs that is made by others or before."""
    for phase, microbatch, chunk in turn:
        part = part_of(stage, chunk, stages, True)
        if phase == "forward" and part:
            yield "forward", microbatch, part - 1
        elif phase == "weight_grad":
            yield "backward", microbatch, part
        elif phase != "forward":
            yield "forward", microbatch, part
            if part < 2 * stages - 1:
                yield "backward", microbatch, part + 1


@unhurried
@given(stages=STAGES, more=MORE, overlapped=st.integers(20, 30))
def test_its_bubble_is_the_papers(stages: int, more: int, overlapped: int) -> None:
    """arXiv 2412.19437 table 2, and deepseek-ai/DualPipe, README.md: of PP parts on PP / 2 stages
    (PP / 2 - 1)(F&B + B - 3W); where a turn waits for none that is longer, F and W a half of B."""
    cost = {"forward": 10, "backward": 20, "input_grad": 10, "weight_grad": 10}
    end, busy = played(stages, 2 * stages + more, cost, overlapped)
    assert end - busy[-1] == (stages - 1) * (overlapped + 20 - 3 * 10)


@unhurried
@given(stages=STAGES, more=MORE)
def test_every_pass_once_in_its_order(stages: int, more: int) -> None:
    microbatches = 2 * stages + more
    for stage in range(stages):
        slots = order("dualpipe_v", stages, 2, microbatches, stage)
        assert slots == [one for turn in turns("dualpipe_v", stages, 2, microbatches, stage) for one in turn]
        for chunk in range(2):
            ways = {"forward": ("forward",), "backward": ("backward", "input_grad")}
            for phases in ways.values():  # so what crosses is taken in the order in which it was sent
                assert [m for p, m, c in slots if p in phases and c == chunk] == list(range(microbatches))
        halves = [slot[1:] for slot in slots if slot[0] == "input_grad"]
        assert [slot[1:] for slot in slots if slot[0] == "weight_grad"] == halves
        assert slots.index(("forward", 0, 0)) == 0
        assert slots[-1][0] == "weight_grad"


@unhurried
@given(stages=STAGES, more=MORE)
def test_every_stage_holds_as_many_parts(stages: int, more: int) -> None:
    """PP + 1 of PP parts, on each of PP / 2 stages."""
    for stage in range(stages):
        alive = most = 0
        for turn in dualpipe_v(stages, 2 * stages + more, stage):
            for phase, _, _ in turn:
                alive += (phase == "forward") - (phase in ("backward", "input_grad"))
                most = max(most, alive)
        assert most == 2 * stages + 1


def test_parts_lie_on_a_v() -> None:
    assert [[part_of(stage, chunk, 4, True) for chunk in range(2)] for stage in range(4)] == [
        [0, 7], [1, 6], [2, 5], [3, 4],
    ]  # fmt: skip
    assert stage_layers(9, 2, 2, 0, (), True) == [[0, 1, 2], [7, 8]]
    assert stage_layers(9, 2, 2, 1, (), True) == [[3, 4], [5, 6]]


def plan(stages: int, *, experts: int = 2, hidden: bool = True, zero: int = 3, keeps: bool = True) -> Any:
    """(strategy, training, stack) of DualPipeV. keeps: parameters and whole gradients stay for the step."""
    ranks, name = 8 // stages, "megatron-core" if zero < 2 else "torchtitan-compile"
    strategy = Strategy(
        name="v", world_size=8, stack=name,
        pipeline=Pipeline(pipeline_parallel=stages, virtual_stages=2, schedule="dualpipe_v"),
        dense=Dense(fsdp=ranks, zero=zero, reshard_after_forward=not keeps),  # type: ignore[arg-type]
        experts=Experts(expert_parallel=experts, expert_fsdp=max(1, ranks // experts)),
        overlap=Overlap(pipeline=True, experts=hidden),
    )  # fmt: skip
    strategy = replace(strategy, activations=replace(strategy.activations, recompute="none"))
    stack, how = load_stack(name), "always" if keeps else "never"
    if zero >= 2:
        stack = replace(stack, sharding=replace(stack.sharding, stays=how, whole_sums=how))
    return strategy, TrainSpec(seq_len=256, global_batch=16 * ranks), stack


def run(strategy: Strategy, training: TrainSpec, stack: Stack) -> SimResult:
    return simulate(MODEL, load_profile("h100-sxm-80g"), 1, strategy, training, stack)


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_what_hides_nothing_takes_as_long(stages: int, zero: int) -> None:
    """Without exchanges of experts there is nothing to hide; with them woven turns are faster, where the
    device sets the pace."""

    def times(experts: int) -> tuple[float, float]:
        found = []
        for hidden in (False, True):
            strategy, training, stack = plan(stages, experts=experts, hidden=hidden, zero=zero)
            stack = replace(stack, host=replace(stack.host, modules=False))
            found.append(run(strategy, replace(training, seq_len=8192), stack).step_time)
        return found[0], found[1]

    in_turn, beside = times(experts=1)
    assert beside == pytest.approx(in_turn, rel=1e-3)
    in_turn, beside = times(experts=2)
    assert beside < in_turn


def lowered(stages: int, **how: Any) -> Workload:
    strategy, training, stack = plan(stages, **how)
    return lower(MODEL, stack.resolve(strategy), training, 8, stack, expand=True)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_what_is_kept_is_gathered_and_reduced_once(stages: int) -> None:
    """No pass between the first forward and the last backward of a part gathers or reduces."""
    for program in lowered(stages).programs:
        names = [op.name for op in program.ops if op.work and op.layer >= 0]
        for start in ("gather ", "reduce "):
            found = [name for name in names if name.startswith(start)]
            assert found
            assert len(found) == len(set(found))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("keeps", [True, False])
def test_microbatches_that_are_not_played_repeat_those_that_are(stages: int, keeps: bool) -> None:
    strategy, training, stack = plan(stages, keeps=keeps, hidden=keeps)
    training = msgspec.structs.replace(training, global_batch=40 * strategy.data_groups)
    short = run(strategy, training, stack)
    whole = simulate(
        MODEL, load_profile("h100-sxm-80g"), 1, strategy, training, stack, timeline=True
    )  # layers as they are
    assert short.step_time == pytest.approx(whole.step_time, rel=2e-3)
    assert short.peak_memory == whole.peak_memory


def test_what_one_stage_hands_on_is_no_message() -> None:
    """The last stage has both sides of the turn; of one stage nothing is sent."""

    def met(stages: int) -> list[list[str]]:
        found = [
            [op.rendezvous for op in one.ops if "ward" in op.rendezvous] for one in lowered(stages).programs
        ]
        return [sorted(one) for one in found]

    first, last = met(2)
    assert first == last
    assert {tuple(key.split()[::2]) for key in first} == {
        ("forward", "1"), ("forward", "3"), ("backward", "0"), ("backward", "2"),
    }  # fmt: skip
    assert met(1) == [[]]
    strategy, training, stack = plan(1)
    waits = replace(strategy, overlap=replace(strategy.overlap, pipeline=False))
    assert run(waits, training, stack).step_time == run(strategy, training, stack).step_time
