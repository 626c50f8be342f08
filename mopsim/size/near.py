"""The cluster that a buyer will most likely prefer to the recommended one: better, for next to nothing."""

from collections.abc import Sequence

from mopsim.size.figures import Goal
from mopsim.size.points import Point

NEAR = 0.02
"""Part of the recommended cluster's cost that another may be dearer by to be a near tie: less than the steps
of two machine types are known to."""


def near_tie(points: Sequence[Point], chosen: Point | None, goal: Goal, max_tie: float) -> Point | None:
    """The cheapest point that does, costs more than a tie (`max_tie`) and at most NEAR more than the chosen
    one, and is both likelier to be in time and likelier to fit; None without a deadline or a price."""
    bill, plan = (chosen.figures, chosen.result) if chosen else (None, None)
    if bill is None or plan is None or bill.cost is None or goal.seconds is None:
        return None
    in_time = bill.p_within(goal.seconds) or 0.0
    found = [
        (one.cost, point.num_nodes, point)
        for point in points
        if point.does and (one := point.figures) and point.result and one.cost is not None
        if max_tie < one.cost / bill.cost - 1 <= NEAR
        if (one.p_within(goal.seconds) or 0.0) > in_time and point.result.p_fits > plan.p_fits
    ]  # fmt: skip
    return min(found, key=lambda one: one[:2])[2] if found else None
