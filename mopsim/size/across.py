"""The plans found anywhere in a sizing, on every machine type and at every count that was asked."""

from collections.abc import Sequence
from heapq import nlargest
from operator import itemgetter

from mopsim.engine import SimResult
from mopsim.size.ask import Ask
from mopsim.size.carry import carried
from mopsim.size.known import AROUND, KnownSteps
from mopsim.spec.strategy import Strategy

CLOSE, MOST = 0.9, 3
"""Part of its machine's best MFU from which a plan is tried where another machine's own best plan is, and
how many plans of its own and of all other machine types are tried at a count."""


def across(known: KnownSteps, everywhere: Sequence[KnownSteps]) -> list[Ask]:
    """Questions for a machine type: each count plays the fastest plans of other counts and machine types that
    are nearer to the best MFU of their own machine type than the count's is to that of its own, and where
    this is the best, those that are CLOSE; the MOST nearest, of its own machine type and of all others. Asked
    until nothing is left; one at a time, so that what a faster plan has displaced is not played."""
    mine, others = _parts([known]), _parts([one for one in everywhere if one is not known])
    best = max((plan.mfu for plan, _ in mine), default=0.0)
    asks = []
    for count in sorted(known.points):
        own = known.answers[count].plans
        reached = own[0].mfu / best if own else 0.0
        least = reached if reached < 1 else CLOSE
        some = [
            plan
            for pool in (mine, others)
            for plan, _ in nlargest(MOST, (one for one in pool if one[1] > least), key=itemgetter(1))
        ]
        asks.append((count, _untried(known, count, some)))
    return [Ask(known.hardware, count, (plan,), first=True) for count, plan in asks if plan is not None]


def _parts(machines: Sequence[KnownSteps]) -> list[tuple[SimResult, float]]:
    """The fastest plan of each count, and its MFU over the best one of its machine type."""
    found = []
    for one in machines:
        plans = [answer.plans[0] for answer in one.answers.values() if answer.plans]
        best = max((plan.mfu for plan in plans), default=0.0)
        found += [(plan, plan.mfu / best) for plan in plans]
    return found


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
