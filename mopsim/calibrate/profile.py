"""Calibration: a profile and measured runs -> a corrected profile, its residuals and intervals.

Per kind of work, measured busy seconds are compared with simulated ones: `scale`, and an overhead per op
where runs differ enough to tell. Collectives, and copies, are corrected as families: a common scale, from
which each kind may differ a little. What is left of the step then goes to a cost per op of the compute stream
(the executor's own Python), a constant per step of each runtime, and a common factor. Corrections are fitted
on the uncorrected curves: calibrating twice is calibrating once with more runs. No run scores its own fit:
`held_out` errors come from fits without the run. A run is simulated with the routing that it measured, and
counts by the part of its steps that nothing disturbed: those that were left out tell how far its other steps
are to be believed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp, log1p
from typing import Any

import msgspec

from mopsim.calibrate.fit import SCALES, RunPoint, StepFit, fit_family, fit_kind, fit_step, scatter
from mopsim.calibrate.observed import Seen, expected, observed
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.engine import SimResult
from mopsim.engine import simulate as engine
from mopsim.spec.hardware import COLLECTIVES, COMPUTE_KINDS, WORK_KINDS, Correction, HardwareProfile
from mopsim.spec.plan import Measurement, Plan

KIN = (("matmul", "grouped_matmul"), ("optimizer", "host_optimizer"))
"""Kinds that err alike: one that no run exercised is scaled as its kin are."""
FAMILIES = (COLLECTIVES, ("h2d", "d2h"))
"""Kinds with a common scale: the wires that they share."""
TRANSFER_NOISE = 0.1
"""Least relative noise of a kind of FAMILIES: two ranks and the scheduler have a part in it."""
ONE_STEP_NOISE = 0.2
"""Relative noise of a kind that was profiled in a single step, which tells none."""
ROUNDS = 2


Simulate = Callable[[Plan, HardwareProfile], SimResult]
Corrections = dict[str, Correction]


@dataclass(frozen=True)
class Residual:
    """Seconds of one kind of work (or "step") in one run; errors are relative (0.1: predicted 10 % too long).

    before: by the profile as given. after: by the new one, which saw this run. held_out: by one that did not
    (None where there is but one run).
    """

    run: str
    kind: str
    measured: float
    before: float
    after: float
    held_out: float | None
    measured_ops: int
    simulated_ops: int

    def error(self, predicted: float | None) -> float | None:
        """Relative error of a prediction; None where there is none, or nothing was measured."""
        return predicted / self.measured - 1.0 if self.measured and predicted is not None else None


@dataclass(frozen=True)
class CalibrationResult:
    """The new profile. intervals: by the name of the software that ran, between how many times the predicted
    step time 90 % of further runs lie. runs: digests. weights: of the runs, the part of their steps that
    nothing disturbed. peaks: bytes that the new profile predicts of the runs, with their own routing."""

    profile: HardwareProfile
    residuals: tuple[Residual, ...]
    intervals: dict[str, tuple[float, float]]
    runs: tuple[str, ...]
    weights: tuple[float, ...]
    peaks: tuple[int, ...] = ()

    def step_errors(self, which: str) -> list[float]:
        """Relative errors of the step, one per run: `which` is before, after or held_out."""
        steps = [row.error(getattr(row, which)) for row in self.residuals if row.kind == "step"]
        return [error for error in steps if error is not None]

    def miss(self, which: str) -> float:
        """By what factor predictions of a step are off, root mean square of its logarithm; 1 of none."""
        errors = [log1p(error) ** 2 for error in self.step_errors(which)]
        return exp(statistics.fmean(errors) ** 0.5) if errors else 1.0

    def to_json(self) -> dict[str, Any]:
        """Seconds and relative errors, for `mopsim calibrate --json`."""
        rows = [
            {
                **asdict(row),
                "before_error": row.error(row.before),
                "after_error": row.error(row.after),
                "held_out_error": row.error(row.held_out),
            }
            for row in self.residuals
        ]
        return {
            "profile": self.profile.name,
            "digest": io.digest(self.profile),
            "calibrated_from": self.profile.calibrated_from,
            "runs": list(self.runs),
            "stacks": list(self.intervals),
            "weights": list(self.weights),
            "peak_memory_bytes": list(self.peaks),
            "intervals": {stack: list(ends) for stack, ends in self.intervals.items()},
            "step_errors": {which: self.step_errors(which) for which in ("before", "after", "held_out")},
            "corrections": io.to_plain(self.profile.corrections),
            "framework_memory_scale": self.profile.framework_memory_scale,
            "observed": io.to_plain(self.profile.runs_seen),
            "residuals": rows,
        }


@dataclass(frozen=True)
class _Run:
    """A measurement and its simulation on the uncorrected profile."""

    measurement: Measurement
    digest: str
    base: SimResult

    @property
    def plan(self) -> Plan:
        return self.measurement.plan_as_routed()

    @property
    def label(self) -> str:
        return f"{self.measurement.plan.strategy.name} ({self.digest})"


def engine_simulate(plan: Plan, profile: HardwareProfile) -> SimResult:
    """One step of a plan on a profile, by the engine."""
    return engine(plan.model, profile, plan.hardware.num_nodes, plan.strategy, plan.training, plan.stack)


def calibrate(
    profile: HardwareProfile, measurements: Sequence[Measurement], simulate: Simulate = engine_simulate
) -> CalibrationResult:
    """Fit the profile's corrections to measured runs of plans made for it.

    Raises MopError where there is no measurement, one is given twice, or one was made for other hardware.
    """
    digests = [io.digest(measurement) for measurement in measurements]
    _check(profile, measurements, digests)
    bare = uncorrected(profile)
    runs = [
        _Run(m, d, simulate(m.plan_as_routed(), bare)) for m, d in zip(measurements, digests, strict=True)
    ]
    new = _corrected(profile, bare, runs, simulate)
    held_out: list[SimResult | None] = [None] * len(runs)
    if len(runs) > 1:
        for i, run in enumerate(runs):
            others = [other for other in runs if other is not run]
            held_out[i] = simulate(run.plan, _corrected(profile, bare, others, simulate))
    residuals, seen = [], []
    for run, unseen in zip(runs, held_out, strict=True):
        before = simulate(run.plan, profile) if profile.corrections else run.base
        after = simulate(run.plan, new)
        left_out = unseen.step_time if unseen else None
        made = after.facts.made
        seen.append(Seen(run.measurement, run.digest, after.step_time, after.peak_memory, made, left_out))
        residuals += _residuals(run, before, after, unseen)
    new = msgspec.structs.replace(new, observed=observed(seen))
    weights = tuple(measurement.quiet for measurement in measurements)
    peaks = tuple(round(one.peak_memory) for one in seen)
    return CalibrationResult(new, tuple(residuals), _intervals(new, seen), tuple(digests), weights, peaks)


def _intervals(profile: HardwareProfile, seen: Sequence[Seen]) -> dict[str, tuple[float, float]]:
    """By stack, the interval of a step of 1 s like those of its runs, of the widest where they differ."""
    found: dict[str, tuple[float, float]] = {}
    for run in seen:
        plan = run.measurement.plan
        mine = expected(plan, profile, run.made).interval(1.0)
        found[plan.stack.name] = max(
            found.get(plan.stack.name, mine), mine, key=lambda ends: ends[1] / ends[0]
        )
    return found


def uncorrected(profile: HardwareProfile) -> HardwareProfile:
    """The profile by its curves alone: what corrections are fitted on."""
    return msgspec.structs.replace(
        profile, corrections={}, framework_memory_scale=1.0, observed=msgspec.UNSET
    )


def _check(profile: HardwareProfile, measurements: Sequence[Measurement], digests: Sequence[str]) -> None:
    if not measurements:
        raise MopError("measurements: none given, at least one run is needed")
    accepted = {io.digest(profile), profile.calibrated_from} - {""}
    for measurement, digest in zip(measurements, digests, strict=True):
        name, hardware = measurement.plan.strategy.name, measurement.plan.hardware
        if digests.count(digest) > 1:
            raise MopError(f"measurements: the run of {name} ({digest}) is given twice")
        if measurement.peak_memory <= 0:
            raise SpecError(
                "measurements: peak_memory", measurement.peak_memory,
                f"of the run of {name} ({digest}) must be at least 1: every step takes memory",
            )  # fmt: skip
        if measurement.elsewhere:
            raise MopError(
                f"measurements: nodes: {measurement.nodes} of the run of {name} ({digest}): "
                f"{measurement.elsewhere}: its collectives are not those between the plan's nodes"
            )
        if hardware.digest not in accepted:
            raise MopError(
                f"measurements: plan.hardware.digest: {hardware.digest!r} of the run of {name} is not that of"
                f" profile {profile.name}, {io.digest(profile)}: it was planned on profile {hardware.name}"
            )


def _corrected(
    profile: HardwareProfile, bare: HardwareProfile, runs: Sequence[_Run], simulate: Simulate
) -> HardwareProfile:
    """`bare` with corrections fitted to `runs`: first by kind, then to the step."""
    launch = bare.device.launch_overhead.si
    source = "runs " + ", ".join(run.label for run in runs)
    single = [kind for kind in WORK_KINDS if not any(kind in family for family in FAMILIES)]
    by_kind = {kind: _kind(kind, bare, runs, source) for kind in single}
    corrections = {kind: correction for kind, correction in by_kind.items() if correction is not None}
    for family in FAMILIES:
        corrections |= _family(family, bare, runs, source)
    corrections = _unseen(corrections, bare, source)
    for _ in range(ROUNDS):
        trial = msgspec.structs.replace(bare, corrections=corrections)
        points = [_step_point(run, simulate(run.plan, trial)) for run in runs]
        corrections = _spread(corrections, fit_step(points, launch), bare, source)
    name = profile.name if profile.name.endswith("-calibrated") else f"{profile.name}-calibrated"
    return msgspec.structs.replace(
        bare,
        name=name,
        corrections=corrections,
        framework_memory_scale=_framework(bare, runs),
        calibrated_from=profile.calibrated_from or io.digest(profile),
    )


def _points(kind: str, runs: Sequence[_Run], least: float = 0.0) -> list[RunPoint]:
    """A kind in every run that both simulates and measures it. least: of its relative noise."""
    points = []
    for run in runs:
        timing, base = run.measurement.kinds.get(kind), run.base.busy.get(kind, 0.0)
        if timing is not None and timing.seconds > 0 and base > 0:
            spread = (timing.seconds_high - timing.seconds_low) / (2 * timing.seconds) or ONE_STEP_NOISE
            noise = max(spread, least)
            ops = run.base.num_ops.get(kind, 0)
            points.append(RunPoint(base, ops, timing.seconds, noise, weight=run.measurement.quiet))
    return points


def _kind(kind: str, bare: HardwareProfile, runs: Sequence[_Run], source: str) -> Correction | None:
    """The correction of one kind, None where no run both simulates and measures it."""
    points = _points(kind, runs)
    if not points:
        return None
    fit = fit_kind(points, max(bare.device.launch_overhead.si, 1e-7), floor(bare, kind))
    return Correction(scale=fit.scale, overhead=fit.overhead, source=source)


def _family(kinds: Sequence[str], bare: HardwareProfile, runs: Sequence[_Run], source: str) -> Corrections:
    """Corrections of kinds that share their wires; those that no run exercised get the family's scale."""
    points = {kind: _points(kind, runs, TRANSFER_NOISE) for kind in kinds}
    if not any(points.values()):
        return {}
    priors = {kind: max(bare.device.launch_overhead.si, 1e-7) for kind in kinds}
    for kind in set(kinds) & set(COLLECTIVES):
        priors[kind] = max(priors[kind], bare.scale_up.collectives[kind].latency.si)
    common, fits = fit_family(points, priors, {kind: floor(bare, kind) for kind in kinds})
    found = {kind: Correction(scale=f.scale, overhead=f.overhead, source=source) for kind, f in fits.items()}
    return _of_kin(kinds, common, bare, source) | found


def _unseen(corrections: Corrections, bare: HardwareProfile, source: str) -> Corrections:
    """With corrections of kinds that no run exercised: the geometric mean of their kin's scales."""
    found: Corrections = {}
    for family in KIN:
        scales = [corrections[kind].scale for kind in family if kind in corrections]
        if scales:
            found |= _of_kin(family, statistics.geometric_mean(scales), bare, source)
    return found | corrections


def _of_kin(kinds: Sequence[str], scale: float, bare: HardwareProfile, source: str) -> Corrections:
    """Kinds scaled as their kin, as far as physics allows."""
    note = f"the kin of this kind in {source}"
    return {kind: Correction(scale=max(scale, floor(bare, kind)), source=note) for kind in kinds}


def floor(bare: HardwareProfile, kind: str) -> float:
    """The least scale that keeps a kind within its datasheet peak. A CPU's is measured: no floor."""
    if bare.device_kind == "cpu":
        return SCALES[0]
    device = bare.device
    if kind == "matmul":
        return max(curve.efficiency for curve in device.matmul)
    if kind == "grouped_matmul":
        return max(curve.efficiency for curve in device.grouped_matmul or device.matmul)
    if kind == "attention":
        return max(device.attention.forward, device.attention.backward)
    if kind in COLLECTIVES:
        return min(
            max(f.collectives[kind].bandwidth.si / f.peak.si, SCALES[0])
            for f in (bare.scale_up, bare.scale_out)
        )
    return SCALES[0]


def _step_point(run: _Run, simulated: SimResult) -> RunPoint:
    ops = sum(simulated.num_ops.get(kind, 0) for kind in COMPUTE_KINDS)
    measured = run.measurement
    noise, runtime = scatter(measured.step_times), run.plan.stack.runtime or run.plan.stack.name
    return RunPoint(simulated.step_time, ops, measured.step_time_median, noise, runtime, measured.quiet)


def _spread(corrections: Corrections, fit: StepFit, bare: HardwareProfile, source: str) -> Corrections:
    """What is left of the step, put where the simulator prices it: on every kind, every op, and the step."""
    new: Corrections = {}
    for kind in WORK_KINDS:
        old = corrections.get(kind, Correction())
        scale = min(max(old.scale * fit.factor, floor(bare, kind), SCALES[0]), SCALES[1])
        overhead = old.overhead * fit.factor + (fit.per_op if kind in COMPUTE_KINDS else 0.0)
        new[kind] = Correction(scale=scale, overhead=min(overhead, 1.0), source=old.source or source)
    for runtime, constant in fit.constants.items():
        kind = f"step_{runtime}"
        before = corrections[kind].overhead if kind in corrections else 0.0
        new[kind] = Correction(overhead=min(before + constant, 1.0), source=source)
    usual = statistics.fmean(new[f"step_{runtime}"].overhead for runtime in fit.constants)
    new["step"] = Correction(overhead=usual, source=f"the mean of the runtimes in {source}")
    return new


def _framework(bare: HardwareProfile, runs: Sequence[_Run]) -> float:
    """Measured over predicted peak, where an allocator measured it; tracked memory (CPU) needs none."""
    if bare.device_kind == "cpu":
        return 1.0
    ratios = [run.measurement.peak_memory / max(run.base.peak_memory, 1) for run in runs]
    return min(max(statistics.median(ratios), 1.0), 1.5)


def _residuals(run: _Run, before: SimResult, after: SimResult, unseen: SimResult | None) -> list[Residual]:
    rows = []
    for kind in WORK_KINDS:
        timing = run.measurement.kinds.get(kind)
        if timing is None and not before.busy.get(kind):
            continue
        rows.append(
            Residual(
                run=run.label,
                kind=kind,
                measured=timing.seconds if timing else 0.0,
                before=before.busy.get(kind, 0.0),
                after=after.busy.get(kind, 0.0),
                held_out=unseen.busy.get(kind, 0.0) if unseen else None,
                measured_ops=timing.count if timing else 0,
                simulated_ops=before.num_ops.get(kind, 0),
            )
        )
    measured = run.measurement.step_time_median
    seen = unseen.step_time if unseen else None
    rows.append(Residual(run.label, "step", measured, before.step_time, after.step_time, seen, 0, 0))
    return rows
