"""Sequences of a microbatch that go through a layer side by side where parameters are gathered by layer."""

import random
from functools import reduce

import pytest
from msgspec import structs

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, run
from mopsim.program import side_by_side, side_passes
from mopsim.program.context import make_context
from mopsim.program.lower import lower, passes_of
from mopsim.program.passes import Passes
from mopsim.program.side_by_side import abreast, of_one, woven
from mopsim.program.template import Template
from mopsim.program.workload import Workload
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2

MODEL, CARD, STACK = load_model("qwen3_30b_a3b"), load_profile("h200-sxm-141g"), "xtuner-compile"


def strategy(rng: random.Random, sequences: int, *, beside: bool = True) -> Strategy:
    """Of 16 ranks."""
    made = fsdp2(
        16, micro_batch=sequences, expert_parallel=rng.choice((2, 4, 8)), fsdp=rng.choice((8, 16)),
        recompute=rng.choice(("none", "full")), prefetch=rng.choice((1, 2)),
    )  # fmt: skip
    how = structs.replace(made.experts, token_dispatcher=rng.choice(("alltoall", "deepep")))
    overlap = structs.replace(made.overlap, experts=beside)
    return structs.replace(made, experts=how, overlap=overlap, stack=STACK)


def training(batch: int) -> TrainSpec:
    return TrainSpec(seq_len=4096, global_batch=batch)


def made(plan: Strategy, batch: int, *, compose: bool = True) -> Workload:
    return lower(MODEL, plan, training(batch), CARD.scale_up_size, compose=compose)


def played(plan: Strategy, batch: int, *, compose: bool = True) -> SimResult:
    return run(made(plan, batch, compose=compose), MODEL, CARD, plan, training(batch))


def sent(workload: Workload, kind: str) -> float:
    """Bytes of a step in which parameters are gathered, or gradients reduced."""
    (program,) = workload.programs
    times = [op.times for op in program.ops]
    return sum(
        work.bytes * many
        for op, many in zip(program.ops, times, strict=True)
        for work in op.work
        if work.kind == kind and op.name.startswith(("gather ", "reduce "))
    )


@pytest.mark.parametrize("seed", range(8))
def test_they_take_no_longer_than_one_after_the_other(seed: int) -> None:
    count = random.Random(seed).choice((2, 4))
    alone = played(strategy(random.Random(seed + 1), 1, beside=False), 16 * count)
    beside = played(strategy(random.Random(seed + 1), count), 16 * count)
    assert beside.step_time <= alone.step_time
    assert beside.flops == pytest.approx(alone.flops)
    assert beside.exposed.get("all_to_all", 0.0) <= alone.exposed.get("all_to_all", 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_they_take_no_longer_than_in_turn(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels, each sequence once the one before it is through the layer."""
    plan = strategy(random.Random(seed), 2)
    monkeypatch.setattr(side_by_side, "_added", lambda piece, width: ())
    beside = played(plan, 32)
    monkeypatch.setattr(side_passes, "woven", lambda one, count, _: reduce(Template.then, [one] * count))
    in_turn = played(plan, 32)
    assert beside.step_time < in_turn.step_time
    assert beside.busy["all_to_all"] == pytest.approx(in_turn.busy["all_to_all"])


@pytest.mark.parametrize("count", [2, 4])
def test_peaks_are_those_of_one_batch(count: int) -> None:
    """What is kept for the backward is there of all, whichever way they go."""
    plans = [strategy(random.Random(5), count, beside=beside) for beside in (False, True)]
    batch, beside = (played(plan, 16 * count).peak_memory for plan in plans)
    assert beside == pytest.approx(batch, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_is_gathered_and_reduced_once_for_all(seed: int) -> None:
    each = made(strategy(random.Random(seed), 1, beside=False), 32, compose=False)
    both = made(strategy(random.Random(seed), 2), 32, compose=False)
    batch = made(strategy(random.Random(seed), 2, beside=False), 32, compose=False)
    for kind in ("all_gather", "reduce_scatter"):
        assert sent(each, kind) == 2 * sent(both, kind) > 0
        assert sent(batch, kind) == sent(both, kind)


@pytest.mark.parametrize("seed", range(4))
def test_composed_layers_are_those_that_are_played(seed: int) -> None:
    plan = strategy(random.Random(seed), 2)
    short, whole = played(plan, 64), played(plan, 64, compose=False)
    assert short.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert short.memory_by_category == whole.memory_by_category
    assert short.num_ops == whole.num_ops


def test_activations_of_all_live_together() -> None:
    """What a layer keeps of each, and all that each makes again in the backward."""
    rng = random.Random(1)
    plan = structs.replace(strategy(rng, 2), activations=fsdp2(8, recompute="none").activations)
    context = make_context(MODEL, plan, training(32), 8)
    (one,) = {Passes(of_one(context)).kept(0)}
    assert passes_of(context).kept(0) == tuple((category, 2 * size) for category, size in one)


def test_one_alone_is_what_it_was() -> None:
    plan = strategy(random.Random(0), 2)
    context = make_context(MODEL, plan, training(32), 8)
    assert abreast(context) == 2
    template = Passes(of_one(context)).backward(0)
    assert woven(template, 1, 2) == template


def test_one_sequence_has_nothing_beside_it() -> None:
    with pytest.raises(SpecError, match=r"overlap\.experts.*micro_batch 1"):
        made(strategy(random.Random(0), 1), 32)
