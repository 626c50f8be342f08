"""FSDP1 under no_sync: flat gradients stay whole, in the dtype of the products, until the last microbatch."""

import pytest
from msgspec.structs import replace

from mopsim.engine import simulate
from mopsim.engine.simulate import run
from mopsim.graph import total_params
from mopsim.program import lower
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.toys import machine, small
from tests.software import changed


def flat(when: str = "always") -> Stack:
    return changed("transformers-fsdp1", sharding={"whole_sums": when})


def ranks(**given: bool) -> Strategy:
    return replace(fsdp2(8, **given), stack="transformers-fsdp1")


def training(microbatches: int) -> TrainSpec:
    return TrainSpec(seq_len=64, global_batch=8 * microbatches)


def test_only_the_last_microbatch_reduces_and_the_others_are_added_in_their_own_dtype() -> None:
    ops = lower(small(), ranks(), training(4), 8, stack=flat()).programs[0].ops
    last = max(op.microbatch for op in ops)
    assert {op.microbatch for op in ops if op.name.startswith("reduce ")} == {last}
    sums = [[work.bytes for work in op.work] for op in ops if op.name == "sum layers.1.dense"]
    flats = [op.work[0].bytes for op in ops if op.name == "flat gradient layers.1.dense"]
    assert sums == [[], *last * [[pytest.approx(1.5 * flats[0], rel=0.01)]]], "read twice, written once"


def test_whole_gradients_are_there_of_several_microbatches_alone() -> None:
    """Of 2 bytes each; a step of one microbatch is as it was."""
    whole = 2 * total_params(small())
    for microbatches in (1, 2, 5):
        both = (
            simulate(small(), machine(), 1, ranks(), training(microbatches), flat(w))
            for w in ("always", "never")
        )
        kept, plain = (found.highest_by_category["gathered_grads"] for found in both)
        assert kept - plain == 0 if microbatches == 1 else whole / 2 < kept - plain <= whole, microbatches


def test_parameters_that_no_forward_frees_stay_until_the_last_backward() -> None:
    """torch's SHARD_GRAD_OP gathers once a step, FULL_SHARD twice a microbatch that is played."""
    for reshards, when, each in ((False, "always", 0), (False, "never", 1), (True, "always", 2)):
        strategy = ranks(reshard_after_forward=reshards)
        ops = lower(small(), strategy, training(4), 8, stack=flat(when)).programs[0].ops
        played = 1 + max(op.microbatch for op in ops)
        gathers = sum(op.name == "gather layers.1.dense" for op in ops)
        assert gathers == max(1, each * played), (reshards, when)


@pytest.mark.parametrize("reshards", [False, True])
def test_microbatches_that_are_not_played_sum_too(reshards: bool) -> None:
    model, job, strategy = small(), training(6), ranks(reshard_after_forward=reshards)
    short, every = (
        run(lower(model, strategy, job, 8, stack=flat(), expand=expand), model, machine(), strategy, job)
        for expand in (False, True)
    )
    assert short.step_time == pytest.approx(every.step_time, rel=0.002)
    assert short.peak_memory == every.peak_memory
