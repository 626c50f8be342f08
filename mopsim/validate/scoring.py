"""Errors of predictions: runs averaged within a source, then sources; capacity; choice of strategy."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from mopsim.common import io
from mopsim.intervals.errors import ErrorCell, Name, known_errors
from mopsim.intervals.spread import Spread
from mopsim.spec.routing import EVEN
from mopsim.validate import calibration
from mopsim.validate.calibration import LAUNCH, Fit, HoldOut, PacedRun
from mopsim.validate.case import Case
from mopsim.validate.scored import Scored, trusted
from mopsim.validate.simulated import Simulated, as_read
from mopsim.validate.uncertain import cell, expected, is_new, reading

UNUSED = Fit()


def software(case: Case) -> tuple[str, str]:
    """(source, hardware): a program on a machine, the unit of calibration."""
    return case.source.name, case.hardware


def score(cases: Sequence[Case], results: Sequence[Simulated], hold_out: HoldOut = "source") -> list[Scored]:
    """Calibrate per source and hardware, leave out what `hold_out` says (calibration.held_out); results with
    an error are left out by the caller."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        groups[software(case)].append(index)
    found: dict[int, Scored] = {}
    for members in groups.values():
        group = RunGroup([(cases[i], results[i]) for i in members])
        found |= zip(members, group.scored(hold_out), strict=True)
    return [found[i] for i in range(len(cases))]


class RunGroup:
    """Runs of one source and machine type, by their place: what is calibrated and expected of some, given
    others. points: of those whose time was measured. issue: seconds of the host a launch."""

    def __init__(self, runs: Sequence[tuple[Case, Simulated]]) -> None:
        self.runs = list(runs)
        self.points = {i: point for i, run in enumerate(runs) if (point := _point(*run))}
        issue = runs[0][0].profile().host.cpu_launch_time
        self.issue = issue.si if issue else LAUNCH
        self._found: dict[object, Spread] = {}

    def scored(self, hold_out: HoldOut) -> list[Scored]:
        """All runs, each by what the hold-out leaves."""
        usable = [trusted(self.runs[i][0]) for i in self.points]
        held = calibration.held_out(
            list(self.points.values()), usable, self.issue, hold_out, is_new(self.runs[0][0])
        )
        fits = dict(zip(self.points, held, strict=True))
        found = []
        for i, (case, result) in enumerate(self.runs):
            used, known = fits.get(i, UNUSED), self._left(case, hold_out)
            step = used.apply(self.points[i]) if i in self.points else result.step_time
            spreads = (
                self.given(known, i, "step_time", used=used),
                self.given(known, i, "peak_memory", read=reading(case)),
                self.given(known, i, "peak_memory"),
            )
            found.append(Scored(case, result, used, step, self._peak(i), *spreads))
        return found

    def _left(self, case: Case, hold_out: HoldOut) -> tuple[int, ...]:
        """Places of the runs that a prediction may learn from."""
        if hold_out == "source":
            return ()
        known = (i for i, (other, _) in enumerate(self.runs) if trusted(other))
        return tuple(i for i in known if hold_out == "none" or self.runs[i][0].identity() != case.identity())

    def given(
        self, known: Sequence[int], place: int, name: Name, *, used: Fit = UNUSED, read: str = ""
    ) -> Spread:
        """The error to expect of a run, given others: of its time as `used` predicts it, or of its peak as
        `read`, where it is not of the tensors themselves."""
        case = self.runs[place][0]
        key = (tuple(known), cell(case), name, used, read)
        if key not in self._found:
            seen = self._times(known, used) if name == "step_time" else self._peaks(known)
            self._found[key] = expected(case, name, seen, read)
        return self._found[key].times(self._scale(place)) if name == "step_time" else self._found[key]

    def _scale(self, place: int) -> float:
        """By how much the error of a run's time exceeds a usual one's."""
        case, result = self.runs[place]
        return known_errors().of("step_time", case.stack).scale(result.made)

    def _times(self, known: Sequence[int], used: Fit) -> list[ErrorCell]:
        points = self.points
        return [
            cell(self.runs[i][0], points[i].measured, used.apply(points[i]), made=self.runs[i][1].made)
            for i in known
            if i in points
        ]

    def _peaks(self, known: Sequence[int]) -> list[ErrorCell]:
        read = [(i, self.runs[i][0].measured.peak_memory) for i in known]
        return [
            cell(case := self.runs[i][0], measured, self._peak(i), reading(case))
            for i, measured in read
            if measured
        ]

    def _peak(self, place: int) -> float:
        case, result = self.runs[place]
        return as_read(result, case.program().reading, case.profile())


def _point(case: Case, result: Simulated) -> PacedRun | None:
    """The run as what a calibration is fitted to; None where no step time was measured."""
    measured = case.measured.step_time
    return PacedRun(result.step_time, result.paces, measured, case.identity()) if measured else None


@dataclass(frozen=True)
class ErrorSummary:
    """Relative errors of one group of rows: count, mean and median size, signed mean, largest, 90th
    percentile."""

    n: int
    mape: float
    median_ape: float
    bias: float
    max_ape: float
    p90_ape: float


def errors(values: Iterable[float | None]) -> ErrorSummary | None:
    """Statistics over the rows themselves; None where there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    sizes = sorted(abs(value) for value in known)
    p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return ErrorSummary(len(known), fmean(sizes), median(sizes), fmean(known), sizes[-1], p90)


Measure = Callable[[Scored], float | None]


def by_group(
    scored: Iterable[Scored], measure: Measure, key: Callable[[Scored], str]
) -> dict[str, ErrorSummary]:
    """Errors of each group that has any."""
    groups: dict[str, list[float | None]] = defaultdict(list)
    for one in scored:
        groups[key(one)].append(measure(one))
    found = {name: errors(values) for name, values in groups.items()}
    return {name: value for name, value in found.items() if value is not None}


def over_sources(scored: Iterable[Scored], measure: Measure) -> ErrorSummary | None:
    """Rows averaged within a source, then sources; the median, the largest and the percentile are over all
    rows."""
    rows = list(scored)
    sources = by_group(rows, measure, lambda one: one.case.source.name)
    everything = errors(measure(one) for one in rows)
    if everything is None:
        return None
    mean, bias = (fmean(getattr(one, name) for one in sources.values()) for name in ("mape", "bias"))
    return replace(everything, mape=mean, bias=bias)


@dataclass(frozen=True)
class Capacity:
    """Runs that ran, and how many of them are predicted to fit with P(fits) above 0.5; runs that ran out, and
    how many of them are not."""

    ran: int
    ran_right: int
    ran_out: int
    ran_out_right: int

    @property
    def right(self) -> int:
        return self.ran_right + self.ran_out_right


def capacity(scored: Iterable[Scored]) -> Capacity:
    """What a run does is known where it has a step time or says so itself."""
    known = [(one.case.measured.fits, one.likely) for one in scored]
    ran, out = ([likely for fits, likely in known if fits is said] for said in (True, False))
    return Capacity(len(ran), sum(ran), len(out), len(out) - sum(out))


@dataclass(frozen=True)
class Regret:
    """Runs of one job that differ only in strategy: what our pick costs against the true best.

    uncalibrated: slowdown of the pick that the profile alone makes.
    """

    job: str
    runs: int
    picked: str
    best: str
    slowdown: float
    uncalibrated: float


def regrets(scored: Iterable[Scored]) -> list[Regret]:
    """Jobs with at least two different strategies, all measured, grade C apart; our pick is calibrated."""

    def slowdown(run: Scored, best: Scored) -> float:
        return (run.case.measured.step_time or 0.0) / (best.case.measured.step_time or 1.0) - 1.0

    jobs: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for one in scored:
        if one.case.measured.step_time and trusted(one.case):
            jobs[_job(one.case)].append(one)
    found = []
    for job, runs in jobs.items():
        if len({run.case.resolved() for run in runs}) < 2:
            continue
        picked = min(runs, key=lambda run: run.calibrated)
        best = min(runs, key=lambda run: run.case.measured.step_time or 0.0)
        alone = min(runs, key=lambda run: run.simulated.step_time)
        found.append(
            Regret(
                " ".join(job[:5]), len(runs), picked.case.id, best.case.id, slowdown(picked, best),
                slowdown(alone, best),
            )
        )  # fmt: skip
    return found


def _job(case: Case) -> tuple[str, ...]:
    """Everything but the strategy: what is trained, on what, by which software."""
    training, overlap = case.training, case.resolved().overlap
    sizes = (f"{case.strategy.world_size} devices", f"{training.seq_len} x {training.global_batch}")
    routed = "" if training.routing in EVEN else "unevenly routed"
    layers = str(case.network().num_hidden_layers)
    chosen = (case.precision, case.strategy.experts.token_dispatcher, io.digest(overlap), routed, layers)
    program = (case.stack, io.digest(case.program().behaviour))
    return (case.source.name, case.model_name, case.hardware, *sizes, *chosen, *program)
