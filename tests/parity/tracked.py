"""A step on tensors without data, tracked; half of what axes make."""

from collections.abc import Iterable
from itertools import product
from typing import Any, TypeVar

from mopexec.check import dry_run
from mopexec.measure.tracker import MemoryTracker
from mopexec.run.apply import build
from mopsim.spec.plan import Plan

Tracker = TypeVar("Tracker", bound=MemoryTracker)


def second_step(plan: Plan, rank: int, kind: type[Tracker]) -> Tracker:
    """A tracker of this kind after the second step of a rank: peaks are of that step, when optimizer state
    is there. The first has a microbatch, or one a stage: it is there for the state."""
    tracker = kind(meta=plan.stack.runtime != "fully_shard")
    with dry_run._fake_platform(plan, rank) as platform, tracker:
        runner, batches = build(plan, platform, routing="profile"), dry_run._batches(plan, platform)
        runner.step(batches[: plan.strategy.pipeline.pipeline_parallel])
        tracker.reset_peak()
        runner.step(batches)
        del runner
    return tracker


def halved(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Half of what the axes make, in which any values of all but one of them go together."""
    every = product(*map(enumerate, axes))
    return [tuple(value for _, value in one) for one in every if sum(place for place, _ in one) % 2 == 0]
