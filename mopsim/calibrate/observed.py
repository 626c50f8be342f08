"""What calibration leaves in a profile for the intervals of what is predicted from it."""

from collections import defaultdict
from collections.abc import Sequence
from math import log
from statistics import fmean
from typing import NamedTuple

from mopsim.intervals import Facts, Spread, network, of_step_time, products
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.observed import Observed
from mopsim.spec.plan import Measurement, Plan


class Seen(NamedTuple):
    """A measured run, its digest, and what was predicted of it (seconds, bytes), where it can be by a profile
    that was fitted without the run."""

    measurement: Measurement
    digest: str
    step_time: float
    peak_memory: float


def observed(runs: Sequence[Seen]) -> tuple[Observed, ...]:
    """Runs that are alike in stack, precision and network, together."""
    groups: dict[tuple[str, str, str], list[Seen]] = defaultdict(list)
    for run in runs:
        plan = run.measurement.plan
        groups[plan.stack.name, products(plan.strategy.precision), network(plan.model)].append(run)
    return tuple(
        Observed(
            stack=stack, precision=precision, network=model, runs=len(some),
            step_time=round(fmean(log(one.measurement.step_time_median / one.step_time) for one in some), 5),
            peak_memory=_peaks(some), source="runs " + ", ".join(one.digest for one in some),
        )
        for (stack, precision, model), some in groups.items()
    )  # fmt: skip


def _peaks(runs: Sequence[Seen]) -> float | None:
    read = [
        log(one.measurement.peak_memory / one.peak_memory)
        for one in runs
        if one.measurement.peak_memory > 0 and one.peak_memory > 0
    ]
    return round(fmean(read), 5) if read else None


def expected(plan: Plan, profile: HardwareProfile) -> Spread:
    """The error to expect of the step time of another run like this plan's, predicted from a profile."""
    return of_step_time(
        Facts(
            stack=plan.stack.name, hardware=profile.name, precision=products(plan.strategy.precision),
            network=network(plan.model), seen=profile.runs_seen,
        )
    )  # fmt: skip
