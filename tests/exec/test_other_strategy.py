"""A run goes on at another number of ranks, in the other runtime and under another strategy."""

import msgspec
import pytest
from msgspec.structs import replace

from mopsim import strategies
from mopsim.common import io
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Precision
from tests.exec.train_plans import small_plan
from tests.exec.train_runs import TRAINING, UNTIMED, losses, train_as_ranks, write_inputs
from tests.plans import split

FLOAT64 = Precision(compute="float64", param="float64", reduce="float64", grad="float64", master="param",
                    moments="float64")  # fmt: skip


def in_float64(plan):
    return msgspec.structs.replace(plan, strategy=msgspec.structs.replace(plan.strategy, precision=FLOAT64))


def fsdp2_plan(world_size, **options):
    strategy = strategies.fsdp2(world_size, dtype="float64", **options)
    return msgspec.structs.replace(
        small_plan(**TRAINING), strategy=strategy, stack=load_stack(strategy.stack)
    )


def split_plan(world_size, **options):
    strategy = split(world_size, dtype="float64", **options)
    stack = load_stack(strategy.stack)
    return msgspec.structs.replace(small_plan(**TRAINING), strategy=stack.resolve(strategy), stack=stack)


def test_the_losses_go_on_as_if_undisturbed(tmp_path):
    """A weight that embedding and head share is one in every checkpoint, however it was split."""
    plans = [
        in_float64(small_plan(1, **TRAINING)),
        fsdp2_plan(4, tensor_parallel=2, context_parallel=2, context_exchange="ring", expert_parallel=2),
        split_plan(2, tensor_parallel=2, expert_tensor_parallel=2),
        in_float64(small_plan(2, **TRAINING)),
    ]
    gpt = {"tie_word_embeddings": True, "learned_positions": 64}
    _check([replace(plan, model=replace(plan.model, **gpt)) for plan in plans], tmp_path)


def test_so_do_those_of_stages(tmp_path):
    _check([split_plan(2, pipeline_parallel=2), fsdp2_plan(2, expert_parallel=2, recompute="full")], tmp_path)


def _check(plans, tmp_path):
    """The losses of two steps under each plan are those of all under the first, of one rank."""
    inputs = write_inputs(tmp_path)
    out, whole = tmp_path / "parts", tmp_path / "whole"
    for number, plan in enumerate(plans):
        io.write_yaml(inputs / "plan.yaml", plan)
        resume = ["--resume"] if number else []
        done = train_as_ranks(inputs, out, "--steps", str(2 * number + 2), *UNTIMED, *resume)
        assert done.returncode == 0, done.stderr
    io.write_yaml(inputs / "plan.yaml", plans[0])
    assert train_as_ranks(inputs, whole, "--steps", str(2 * len(plans)), *UNTIMED).returncode == 0
    assert losses(out) == pytest.approx(losses(whole), rel=1e-9)
