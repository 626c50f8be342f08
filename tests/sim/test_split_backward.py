"""Gradients of weights that are made apart, beside FSDP2's groups of a layer."""

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.spec.presets import load_model
from mopsim.strategies import megatron


@pytest.mark.parametrize("stack", ["torchtitan", "torchtitan-compile", "generic-eager", "bionemo-te"])
@pytest.mark.parametrize(("fsdp", "expert_parallel"), [(4, 4), (4, 2), (4, 1), (2, 2)])
def test_two_groups_of_a_layer_share_its_gradients(stack: str, fsdp: int, expert_parallel: int) -> None:
    """Experts that fewer ranks share than the rest are a group of their own, beside which nothing is left
    over once the step has ended (the engine's check), whatever the degrees are."""
    made = megatron(8, pipeline_parallel=2, expert_parallel=expert_parallel, recompute="none")
    strategy = replace(
        made, pipeline=replace(made.pipeline, schedule="zero_bubble"), stack=stack,
        dense=replace(made.dense, zero=3, fsdp=fsdp),
        experts=replace(made.experts, expert_fsdp=max(1, fsdp // expert_parallel)),
    )  # fmt: skip
    found = mopsim.simulate(
        load_model("tiny"), "h200-sxm-141g", strategy=strategy, seq_len=512, global_batch=16, stack=stack
    )
    assert found["step_time_s"] > 0
