"""Predicted against tracked peaks of plans drawn at random, of the rank with the most rows: of each tier, of
weights as they are stored and gathered, of optimizer state and of the passes: what no other test has at once.
"""

import pytest

from mopsim.spec.plan import Plan
from tests.parity.drawn_plans import drawn_plan
from tests.parity.test_peaks_by_part import WHOLE, WITHIN, predicted, together, tracked

SEEDS = [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 80))]
EXACT = ("weights", "gathered weights", "optimizer state", "backward")
"""Beside the tiers: rows that agree whatever is drawn; of gradients, those of a shared weight and of what
autograd makes of a product's weight are booked otherwise."""
BY_PART = 60
"""Plans, the first ones, of which these rows are compared."""


def _rows(seed: int, plan: Plan) -> tuple[str, ...]:
    """A forward whose layers are run again holds, for longer than is predicted, what attention trades and the
    products of latent attention."""
    if seed >= BY_PART:
        return (*WHOLE,)
    return (*WHOLE, *EXACT, *(("forward",) if plan.strategy.activations.recompute == "none" else ()))


@pytest.mark.parametrize("seed", SEEDS)
def test_peaks(seed: int) -> None:
    plan = drawn_plan(seed)
    ranks = {0, plan.strategy.world_size - 1} if plan.training.routing != "balanced" else {0}
    known = max((tracked(plan, rank) for rank in ranks), key=lambda one: one["device"])
    found, known = together(plan, predicted(plan)), together(plan, known)
    within = {row: (found[row], known[row]) for row in _rows(seed, plan) if known[row] or row in WHOLE}
    off = {
        row: pair
        for row, pair in within.items()
        if pair[0] != pytest.approx(pair[1], rel=WHOLE.get(row, WITHIN))
    }
    assert not off
