"""An update under the backward: units are updated once their gradients are final, which are freed then."""

import math
from typing import Any

import pytest
from msgspec.structs import replace

from mopexec.measure.tracker import MemoryTracker
from mopexec.run.supported import check_supported
from mopsim.common.errors import SpecError
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO, DENSE, check
from tests.parity.tracked import second_step
from tests.plans import changed, plan_of

UNCLIPPED = {"clip_norm": 0.0}
EARLY = {"overlap": "backward"}
STATES: dict[str, dict[str, Any]] = {
    "offloaded": {"state_tier": "host", "bucket_params": 700},
    "one_slot": {"state_tier": "host", "bucket_params": 2000, "slots": 1},
    "resident": {"bucket_params": 600},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "replicated": {"dense": {"prefetch": 1, "chunk_tokens": 8, "fsdp": 1}},
    "experts_sharded": {"experts": {"expert_parallel": 1, "expert_fsdp": 2}},
}
BF16: dict[str, Any] = {
    "compute": "bfloat16", "param": "bfloat16", "reduce": "float32", "grad": "bfloat16",
    "moments": "bfloat16", "master": "float32",
}  # fmt: skip


COARSE: dict[str, dict[str, Any]] = ALL_TWO | {
    "dense": {"prefetch": 1, "chunk_tokens": 8},
    "experts": {"expert_parallel": 2, "chunk_tokens": 8},
    "vocabulary": {"loss": "ring", "vocab_parallel": 2, "chunk_tokens": 8},
}
"""All mechanisms, in two chunks each: exchanges take gloo longer than what is between them."""


def _apart(
    work: str, state: str, changes: dict[str, Any], *given: Any, **options: Any
) -> list[tuple[list[float], list[str]]]:
    """What each rank finds by an update under the backward, and what of it is not, to the bit, that of an
    update at the end of the step with state on the device, wherever its own is."""
    options["training"] = UNCLIPPED | {"global_batch": 6} | options.get("training", {})
    plain, early = (
        make_plan(2, changes | {"optimizer": optimizer}, **options)
        for optimizer in (STATES["resident"], STATES[state] | EARLY)
    )
    return pool(2).run("tests.exec.flat_parity", "apart", plain, early, work, *given)


def _same(state: str, changes: dict[str, Any], routing: str = "learned", **options: Any) -> None:
    """Losses, norms, weights and state are those of the update at the end of the step, to the bit."""
    for losses, lost in _apart("train", state, changes, routing, **options):
        assert not lost
        assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("where", "state"),
    [("sharded", "one_slot"), ("replicated", "offloaded"), ("experts_sharded", "resident")],
)
def test_it_is_the_update_at_the_end_of_the_step_to_the_bit(where: str, state: str) -> None:
    _same(state, COARSE | LAYOUTS[where], micro_batch=2)


def test_so_it_is_where_routes_are_given() -> None:
    _same("offloaded", COARSE, routing="profile", training={"routing": "95/4"}, micro_batch=2)


def test_so_it_is_without_experts_and_with_one_microbatch() -> None:
    _same("resident", {}, model=DENSE, micro_batch=1)
    _same("offloaded", {}, training={"global_batch": 2})


def test_so_it_is_where_dtypes_are_apart() -> None:
    """Gradients that are summed in another dtype, and updated in a third."""
    for state in ("offloaded", "resident"):
        _same(state, COARSE | {"precision": BF16}, dtype="bfloat16", micro_batch=2)


@pytest.mark.parametrize(
    ("state", "world", "changes"), [("resident", 2, ALL_TWO), ("offloaded", 4, ALL_FOUR)], ids=("two", "four")
)
def test_it_equals_the_single_device_model(state: str, world: int, changes: dict[str, Any]) -> None:
    check(world, changes | {"optimizer": STATES[state] | EARLY}, training=UNCLIPPED, micro_batch=2)


def test_a_gradient_that_is_no_number_leaves_the_same_finished_step() -> None:
    """As without it the step ends, all units updated, with a norm that stops the run before it saves."""
    for losses, lost in _apart("diverge", "offloaded", COARSE, micro_batch=2):
        assert all(map(math.isnan, losses))
        assert not lost


def test_a_failure_of_the_update_ends_the_step() -> None:
    plan = make_plan(2, {"optimizer": STATES["offloaded"] | EARLY}, training=UNCLIPPED)
    assert pool(2).run("tests.exec.flat_parity", "fail", plan) == ["the device is gone"] * 2


@pytest.mark.parametrize("state", ["offloaded", "resident"])
def test_gradients_are_there_until_their_update(state: str) -> None:
    """Of a step with one microbatch those of two layers at most: of ten, and the edges, under a fifth."""
    training, deep = UNCLIPPED | {"global_batch": 2}, replace(MODEL, num_hidden_layers=10)
    most = {}
    for own in ({}, EARLY):
        parts = {"optimizer": STATES[state] | own, "experts": {"expert_parallel": 2}}
        plan = make_plan(2, parts, training=training, dtype="float32", model=deep)
        most[bool(own)] = second_step(plan, 0, Gradients).most
    assert most[True] < 0.2 * most[False]


class Gradients(MemoryTracker):
    """most: bytes of gradient shards at a time."""

    most = 0

    def _book(self, host: bool, name: str, num_bytes: int) -> None:
        super()._book(host, name, num_bytes)
        self.most = max(self.most, self._device.by_category.get("grads", 0))


def test_other_runtimes_refuse_it() -> None:
    training = TrainSpec(seq_len=16, global_batch=8, clip_norm=0.0)
    with pytest.raises(SpecError, match=r"overlap: 'backward' is not run by fully_shard, only 'none'"):
        check_supported(plan_of(MODEL, changed(fsdp2(2), optimizer=EARLY), training, "cpu"))
