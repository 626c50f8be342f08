"""What calibration leaves in a profile for the intervals of what is predicted from it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import exp, fsum, log
from statistics import fmean
from typing import NamedTuple

from mopsim.common.errors import SpecError
from mopsim.common.units import format_bytes, format_seconds
from mopsim.intervals.made import Made
from mopsim.intervals.spread import Facts, Spread, missed_by_most, network, of_step_time, products
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.observed import MOST_OFF, Observed
from mopsim.spec.plan import Measurement, Plan


class Seen(NamedTuple):
    """A measured run, its digest, and what the fitted profile predicts of it (seconds, bytes, what the step
    is made of). unseen: the step time by a profile that was fitted without the run, if there were others."""

    measurement: Measurement
    digest: str
    step_time: float
    peak_memory: float
    made: Made
    unseen: float | None = None

    @property
    def label(self) -> str:
        """'mop (987f9d09985d)': its strategy's name and its digest."""
        return f"{self.measurement.plan.strategy.name} ({self.digest})"


def observed(runs: Sequence[Seen]) -> tuple[Observed, ...]:
    """Runs that are alike in stack, precision and network, together. Raises SpecError naming the run whose
    prediction is off by more than a profile may say.
    """
    groups: dict[tuple[str, str, str], list[Seen]] = defaultdict(list)
    for run in runs:
        plan = run.measurement.plan
        groups[plan.stack.name, products(plan.strategy.precision), network(plan.model)].append(run)
    return tuple(
        Observed(
            stack=stack, precision=precision, network=model,
            runs=round(sum(one.measurement.quiet for one in some), 3),
            step_time=_off("step_time_median", [_step(one) for one in some], format_seconds),
            peak_memory=_off("peak_memory", [one for one in map(_peak, some) if one], format_bytes),
            step_time_squares=round(_squares(some), 5),
            peak_memory_squares=round(_scatter([one for one in map(_peak, some) if one]), 5),
            step_time_missed=round(missed_by_most(_misses(some)), 5),
            made=tuple(round(fmean(shares), 4) for shares in zip(*(one.made for one in some), strict=True)),
            source="runs " + ", ".join(one.label for one in some),
        )
        for (stack, precision, model), some in groups.items()
    )  # fmt: skip


class _Pair(NamedTuple):
    """One quantity of a run, measured and predicted, both positive."""

    run: Seen
    measured: float
    predicted: float

    @property
    def off(self) -> float:
        return log(self.measured / self.predicted)


def _step(run: Seen) -> _Pair:
    return _Pair(run, run.measurement.step_time_median, run.step_time)


def _peak(run: Seen) -> _Pair | None:
    pair = _Pair(run, run.measurement.peak_memory, run.peak_memory)
    return pair if min(pair.measured, pair.predicted) > 0 else None


def _misses(runs: Sequence[Seen]) -> list[tuple[float, float]]:
    """|ln(measured / predicted)| by profiles that had not seen the runs, else by the one that has, which
    misses no less of a run that counts for little; and what each run counts."""
    told = ((one.measurement, one.unseen or one.step_time) for one in runs)
    return [(abs(log(run.step_time_median / predicted)), run.quiet) for run, predicted in told]


def _squares(runs: Sequence[Seen]) -> float:
    """Sum of the squares of what profiles that had not seen the runs missed."""
    return fsum(weight * off**2 for off, weight in _misses([one for one in runs if one.unseen is not None]))


def _scatter(pairs: Sequence[_Pair]) -> float:
    """Sum of the squares of departures from the mean."""
    mean = _mean(pairs) if pairs else 0.0
    return fsum(pair.run.measurement.quiet * (pair.off - mean) ** 2 for pair in pairs)


def _mean(pairs: Sequence[_Pair]) -> float:
    """ln(measured / predicted), a disturbed run for its quiet part."""
    return fmean((pair.off for pair in pairs), [pair.run.measurement.quiet for pair in pairs])


def _off(field: str, pairs: Sequence[_Pair], show: Callable[[float], str]) -> float | None:
    """`_mean`, None where there is no pair. Raises SpecError where it is more than a profile may say."""
    if not pairs:
        return None
    mean = round(_mean(pairs), 5)
    if abs(mean) <= MOST_OFF:
        return mean
    run, measured, predicted = max(pairs, key=lambda pair: abs(pair.off))
    raise SpecError(
        f"measurements: {field}", measured,
        f"of the run of {run.label} must be within a factor of "
        f"{exp(MOST_OFF):.0f} of the {show(predicted)} predicted",
    )  # fmt: skip


def expected(plan: Plan, profile: HardwareProfile, made: Made) -> Spread:
    """The error to expect of the step time of another run like this plan's, predicted from a profile."""
    return of_step_time(Facts.of(plan.stack, profile, plan.strategy.precision, plan.model, made=made))
