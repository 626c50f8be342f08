"""What `mopexec verify` says is at work: each mechanism of a plan has a name of its own."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopexec.check.scale_down import mechanisms, scale_down
from mopsim.spec.plan import Plan
from mopsim.spec.stacks import load_stack
from tests.exec.flat_plans import make_plan

SPLIT: dict[str, Any] = {
    "attention": {"context_parallel": 2}, "dense": {"fsdp": 2}, "experts": {"expert_parallel": 2},
}  # fmt: skip


def plan(stack: str = "mopexec-fsdp2", **changes: dict[str, Any]) -> Plan:
    """A plan on two ranks with fields of the strategy's parts changed."""
    plan = make_plan(2, SPLIT)
    parts = {name: replace(getattr(plan.strategy, name), **of) for name, of in changes.items()}
    strategy = replace(plan.strategy, stack=stack, **parts)
    return replace(plan, strategy=strategy, stack=load_stack(stack))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention": {"cp_comm_type": "ring"}}, "ring attention over 2"),
        ({"attention": {"cp_comm_type": "all_gather"}}, "keys and values gathered over 2"),
        ({"dense": {"reshard_after_forward": False}}, "gathered parameters kept for the backward"),
        ({"experts": {"balance": "least_loaded"}}, "work of overloaded ranks moved to the least loaded"),
        ({"vocabulary": {"loss": "vocab_parallel", "vocab_parallel": 2}}, "vocabulary split over 2"),
    ],
)
def test_a_mechanism_is_named(changes: dict[str, Any], name: str) -> None:
    assert name in mechanisms(plan(**changes))
    assert name not in mechanisms(plan())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tie_word_embeddings": True}, "embedding and head that share a weight"),
        ({"qk_norm": "unweighted"}, "norms of queries and keys without weights"),
    ],
)
def test_a_part_of_a_network_is_named(changes: dict[str, Any], name: str) -> None:
    whole = plan("mopexec-flat")
    changed = replace(whole, model=replace(whole.model, **changes))
    assert name in mechanisms(scale_down(changed, 2))
    assert name not in mechanisms(scale_down(whole, 2))


def test_nested_checkpoints_are_named_also_scaled_down() -> None:
    name = "nested checkpoints of expert chunks"
    for one in (plan("mopexec-flat-nested"), scale_down(plan("mopexec-flat-nested"), 2)):
        assert name in mechanisms(one)
    assert name not in mechanisms(plan("mopexec-flat"))


@pytest.mark.parametrize(("size", "part"), [(80, 0.4), (128, 0.75), (256, 0.125), (32, 0.9375)])
def test_a_part_of_a_head_is_one_of_a_small_head_too(size: int, part: float) -> None:
    one = plan("mopexec-flat")
    model = replace(one.model, head_dim=size, partial_rotary_factor=part)
    assert 0 < scale_down(replace(one, model=model), 2).model.partial_rotary_factor < 1
