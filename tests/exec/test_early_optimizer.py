"""An update under the backward: units are updated once their gradients are final, which are freed then."""

import math
from typing import Any

import pytest
import torch
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
    "three_slots": {"state_tier": "host", "bucket_params": 500, "slots": 3},
    "resident": {"bucket_params": 600},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": {"dense": ALL_TWO["dense"]},
    "replicated": {"dense": ALL_TWO["dense"] | {"fsdp": 1}},
    "experts_sharded": {"experts": {"expert_parallel": 1, "expert_fsdp": 2}},
}
BF16: dict[str, Any] = {
    "compute": "bfloat16", "param": "bfloat16", "reduce": "float32", "grad": "bfloat16",
    "moments": "bfloat16", "master": "float32",
}  # fmt: skip


Run = tuple[list[float], dict[str, torch.Tensor]]


def _runs(work: str, changes: dict[str, Any], *given: Any, **options: Any) -> list[tuple[Run, Run]]:
    """What a rank finds by the update at the end of the step, and by that under the backward."""
    options["training"] = UNCLIPPED | options.get("training", {})
    runs = []
    for own in ({}, EARLY):
        optimizer = {"optimizer": changes.get("optimizer", {}) | own}
        plan = make_plan(2, changes | optimizer, **options)
        runs.append(pool(2).run("tests.exec.flat_parity", work, plan, *given))
    return list(zip(*runs, strict=True))


def _same(changes: dict[str, Any], routing: str = "learned", **options: Any) -> None:
    """Losses, norms, weights and state are those of the update at the end of the step, to the bit."""
    for plain, early in _runs("train", changes, routing, **options):
        assert plain[0] == early[0]
        assert plain[1].keys() == early[1].keys()
        assert all(torch.equal(value, early[1][name]) for name, value in plain[1].items())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("where", LAYOUTS)
def test_it_is_the_update_at_the_end_of_the_step_to_the_bit(state: str, where: str) -> None:
    _same(ALL_TWO | LAYOUTS[where] | {"optimizer": STATES[state]}, micro_batch=2)


@pytest.mark.parametrize("routing", ["balanced", "95/4"])
@pytest.mark.parametrize("state", ["offloaded", "resident"])
def test_so_it_is_where_routes_are_given(state: str, routing: str) -> None:
    training = {"routing": routing}
    _same(ALL_TWO | {"optimizer": STATES[state]}, routing="profile", training=training, micro_batch=2)


@pytest.mark.parametrize("state", ["offloaded", "resident"])
def test_so_it_is_without_experts_and_with_one_microbatch(state: str) -> None:
    changes = {"optimizer": STATES[state]}
    _same(changes, model=DENSE, micro_batch=2)
    _same(changes, training={"global_batch": 2})


def test_so_it_is_where_dtypes_are_apart() -> None:
    """Gradients that are summed in another dtype, and updated in a third."""
    for state in ("offloaded", "resident"):
        changes = ALL_TWO | {"optimizer": STATES[state], "precision": BF16}
        _same(changes, dtype="bfloat16", micro_batch=2)


@pytest.mark.parametrize("state", ["offloaded", "resident"])
def test_it_equals_the_single_device_model(state: str) -> None:
    for world, changes in ((2, ALL_TWO), (4, ALL_FOUR)):
        plan = changes | {"optimizer": STATES[state] | EARLY}
        check(world, plan, training=UNCLIPPED, micro_batch=2)


@pytest.mark.parametrize("state", ["offloaded", "resident"])
def test_a_gradient_that_is_no_number_leaves_the_same_finished_step(state: str) -> None:
    """As without it the step ends, all units updated, with a norm that stops the run before it saves."""
    for plain, early in _runs("diverge", ALL_TWO | {"optimizer": STATES[state]}, micro_batch=2):
        assert all(map(math.isnan, plain[0] + early[0]))
        assert plain[1].keys() == early[1].keys()
        assert all(
            torch.equal(value.isnan(), early[1][name].isnan())
            and torch.equal(value.nan_to_num(), early[1][name].nan_to_num())
            for name, value in plain[1].items()
        )


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
