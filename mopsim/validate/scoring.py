"""Errors of predictions: runs averaged within a source, then sources; capacity; choice of strategy."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from msgspec.structs import replace

from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.validate import calibration
from mopsim.validate.calibration import LAUNCH, Fit, HoldOut, Point
from mopsim.validate.case import Case
from mopsim.validate.simulated import Simulated, as_read, as_read_at_most


@dataclass(frozen=True)
class Scored:
    """A simulated run. Seconds and bytes; calibrated is of a fit that never saw this run's network.
    peak_memory, most_memory: the point and the upper bound, as the source's instrument reads.

    out_of_sample: whether there was another network of the same source and GPU to calibrate on.
    """

    case: Case
    simulated: Simulated
    fit: Fit
    calibrated: float
    peak_memory: float
    most_memory: float

    @property
    def out_of_sample(self) -> bool:
        return self.fit.runs > 0

    @property
    def step_error(self) -> float | None:
        """Relative error of the calibrated step time; None where none was measured."""
        return _error(self.calibrated, self.case.measured.step_time)

    @property
    def raw_step_error(self) -> float | None:
        return _error(self.simulated.step_time, self.case.measured.step_time)

    @property
    def memory_error(self) -> float | None:
        return _error(self.peak_memory, self.case.measured.peak_memory)

    @property
    def verdict(self) -> str:
        """fits, at risk or out of memory."""
        if not self.simulated.fits:
            return "out of memory"
        return "at risk" if self.simulated.at_risk else "fits"


def _error(predicted: float, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if measured else None


def network(case: Case) -> str:
    """The network that is held out together: cut to other layers, or without its MTP layers, it is the
    same."""
    model = case.model if isinstance(case.model, ModelSpec) else load_model(case.model)
    return io.digest(replace(model, name="network", source="", assumptions=(), num_nextn_predict_layers=0))


def software(case: Case) -> tuple[str, str]:
    """(source, hardware): a program on a machine, the unit of calibration."""
    return case.source.name, case.hardware


def trusted(case: Case) -> bool:
    """Whether a run may be calibrated on: not a headline, a derived or a latency-dominated one (grade C)."""
    return case.quality != "C"


def score(cases: Sequence[Case], results: Sequence[Simulated], hold_out: HoldOut = "model") -> list[Scored]:
    """Calibrate per source and hardware, leave out what `hold_out` says (calibration.held_out); results with
    an error are left out by the caller."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        groups[software(case)].append(index)
    found: dict[int, Scored] = {}
    for members in groups.values():
        points = {i: point for i in members if (point := _point(cases[i], results[i]))}
        issue = cases[members[0]].profile().host.cpu_launch_time
        usable = [trusted(cases[i]) for i in points]
        held = calibration.held_out(list(points.values()), usable, issue.si if issue else LAUNCH, hold_out)
        fits = dict(zip(points, held, strict=True))
        for i in members:
            case, result, used = cases[i], results[i], fits.get(i, Fit())
            step = used.apply(points[i]) if i in points else result.step_time
            reading, hardware = case.program().reading.memory, case.profile()
            peak = as_read(result, reading, hardware)
            found[i] = Scored(case, result, used, step, peak, as_read_at_most(result, reading, hardware))
    return [found[i] for i in range(len(cases))]


def _point(case: Case, result: Simulated) -> Point | None:
    """The run as what a calibration is fitted to; None where no step time was measured."""
    measured = case.measured.step_time
    return Point(result.step_time, result.paces, measured, network(case)) if measured else None


@dataclass(frozen=True)
class Errors:
    """Relative errors of one group of rows: count, mean and median size, signed mean, largest, 90th
    percentile."""

    n: int
    mape: float
    median_ape: float
    bias: float
    max_ape: float
    p90: float

    def to_json(self) -> dict[str, float]:
        return {
            "n": self.n, "mape": self.mape, "median_ape": self.median_ape, "bias": self.bias,
            "max_ape": self.max_ape, "p90_ape": self.p90,
        }  # fmt: skip


def errors(values: Iterable[float | None]) -> Errors | None:
    """Statistics over the rows themselves; None where there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    sizes = sorted(abs(value) for value in known)
    p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return Errors(len(known), fmean(sizes), median(sizes), fmean(known), sizes[-1], p90)


Measure = Callable[[Scored], float | None]


def by_group(scored: Iterable[Scored], measure: Measure, key: Callable[[Scored], str]) -> dict[str, Errors]:
    """Errors of each group that has any."""
    groups: dict[str, list[float | None]] = defaultdict(list)
    for one in scored:
        groups[key(one)].append(measure(one))
    found = {name: errors(values) for name, values in groups.items()}
    return {name: value for name, value in found.items() if value is not None}


def over_sources(scored: Iterable[Scored], measure: Measure) -> Errors | None:
    """Rows averaged within a source, then sources; the median, the largest and the percentile are over all
    rows."""
    rows = list(scored)
    sources = by_group(rows, measure, lambda one: one.case.source.name)
    everything = errors(measure(one) for one in rows)
    if everything is None:
        return None
    return Errors(
        everything.n, fmean(e.mape for e in sources.values()), everything.median_ape,
        fmean(e.bias for e in sources.values()), everything.max_ape, everything.p90,
    )  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """Runs that ran (how many are predicted to fit, how many of these at risk), and runs that ran out (how
    many are predicted to)."""

    ran: int
    ran_right: int
    at_risk: int
    ran_out: int
    ran_out_right: int

    @property
    def right(self) -> int:
        return self.ran_right + self.ran_out_right


def capacity(scored: Iterable[Scored]) -> Capacity:
    """What a run does is known where it has a step time or says so itself."""
    ran = [one.simulated for one in scored if one.case.measured.fits is True]
    out = [one.simulated.fits for one in scored if one.case.measured.fits is False]
    right, at_risk = sum(one.fits for one in ran), sum(one.at_risk for one in ran)
    return Capacity(len(ran), right, at_risk, len(out), len(out) - sum(out))


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
    routed = "" if training.routing == "balanced" else "unevenly routed"
    layers = str(case.network().num_hidden_layers)
    chosen = (case.precision, case.strategy.experts.token_dispatcher, io.digest(overlap), routed, layers)
    program = (case.stack, io.digest(case.program().behaviour))
    return (case.source.name, case.model_name, case.hardware, *sizes, *chosen, *program)
