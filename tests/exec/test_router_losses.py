"""The routers' losses in flat_units, whose gradients are written by hand, against those of autograd."""

from typing import Any

import pytest

from mopsim.spec.model import ModelSpec
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.spawn import pool
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO, NO_QK_NORM

CASES: dict[str, tuple[int, dict[str, Any], ModelSpec, str]] = {
    "one rank": (1, {"experts": {"chunk_tokens": 4}}, MODEL, "learned"),
    "softmax scores": (1, {}, NO_QK_NORM, "learned"),
    "two ranks": (2, {"experts": {"expert_parallel": 2}}, NO_QK_NORM, "learned"),
    "sequences split": (2, ALL_TWO, NO_QK_NORM, "learned"),
    "a profile's choice": (2, ALL_TWO, MODEL, "profile"),
    "placed rows": (2, {"experts": {"expert_parallel": 2, "balance": "least_loaded"}}, MODEL, "learned"),
    "four ranks": (4, ALL_FOUR, MODEL, "learned"),
    "four ranks, softmax": (4, ALL_FOUR, NO_QK_NORM, "learned"),
}


ROWS = [(case, 5) for case in CASES] + [("four ranks", 2048)]
"""Slices that end within sequences, and one of all rows."""


@pytest.mark.parametrize(("case", "rows"), ROWS)
def test_flat_units_has_the_gradients_of_the_single_device_model(case: str, rows: int) -> None:
    world, changes, model, routing = CASES[case]
    losses = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.2, "routing": "80/3"}
    plan = make_plan(world, changes, model=model, micro_batch=2, training=losses)
    given = ("tests.exec.flat_parity", "compare_in_slices", plan, routing, rows)
    for worst in pool(world).run(*given):
        assert max(worst.values()) <= 1e-9, worst
