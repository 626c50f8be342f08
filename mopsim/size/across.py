"""The plans found anywhere in a sizing, on every machine type and at every count that was asked."""

from collections.abc import Sequence

from mopsim.engine import SimResult
from mopsim.size.ask import Ask
from mopsim.size.carry import carried
from mopsim.size.known import AROUND, KnownSteps
from mopsim.spec.strategy import Strategy


def across(known: KnownSteps, everywhere: Sequence[KnownSteps]) -> list[Ask]:
    """A question for each count of a machine type that has not played the fastest plan of some count of any
    of them: the one of the nearest number of ranks. Asked until nothing is left, no count is slower than
    another one's plan there; one at a time, so that what a faster plan has displaced is not played."""
    pool = [found.plans[0] for one in everywhere for found in one.answers.values() if found.plans]
    asks = ((count, _untried(known, count, pool)) for count in sorted(known.points))
    return [Ask(known.hardware, count, (plan,), first=True) for count, plan in asks if plan is not None]


def _untried(known: KnownSteps, count: int, pool: Sequence[SimResult]) -> SimResult | None:
    world = count * known.hardware.devices_per_node
    own = [one.strategy for one in known.answers[count].plans]
    for plan in sorted(pool, key=lambda one: _apart(one.strategy, world)):
        if plan.strategy not in known.given[count]:
            form = next(carried(plan.strategy, world, known.points[count].training.global_batch), None)
            if form and near(plan.strategy, form) and form not in (*known.tried[count], *own):
                return plan
            known.given[count].append(plan.strategy)
    return None


def near(plan: Strategy, form: Strategy) -> bool:
    """Whether data-parallel ranks alone differ, or ranks by a factor AROUND at most: beyond it a nearer plan
    has such a form."""
    return (
        plan.attention.context_parallel == form.attention.context_parallel
        and plan.dense.tensor_parallel == form.dense.tensor_parallel
    ) or _apart(plan, form.world_size) <= AROUND


def _apart(plan: Strategy, world: int) -> float:
    return max(plan.world_size / world, world / plan.world_size)
