"""The fits of calibration, on plain numbers. Runs are few, so every parameter has a prior, written here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]

SCALE_PRIOR = 1.0
"""Standard deviation of ln(scale) of a kind, or of a family of kinds, around 0: a factor e either way is
unsurprising."""
KIN_PRIOR = 0.3
"""Standard deviation of ln(scale) of a kind around that of its family."""
FACTOR_PRIOR = 0.1
"""Standard deviation of ln(factor) of all kinds together: profiled steps are about as fast as others."""
PER_OP_PRIOR = 3.0
"""Standard deviation of the cost per op, in launch overheads: Python around an op costs more than the op."""
CONSTANT_PRIOR = 0.1
"""Standard deviation of the constant per step, as a part of the step. It stands for time in no op: never
negative."""
LEAST_NOISE = 0.05
"""Relative noise of a measured time, whatever its own spread says."""
DISTINCT = 1.2
"""Runs tell a scale from an overhead per op where their simulated seconds per op differ by this factor."""
SCALES = (0.02, 50.0)
"""What mopsim.spec.hardware.Correction accepts."""


@dataclass(frozen=True)
class RunPoint:
    """One kind of work in one run, simulated uncorrected, or its step, kinds corrected, with the ops of the
    compute stream. simulated: seconds; ops: simulated; seconds: measured.

    noise: relative standard deviation of what was measured. runtime: whose Python ran between the ops of a
    step. weight: of the run, 1 where nothing disturbed it.
    """

    simulated: float
    ops: int
    seconds: float
    noise: float
    runtime: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class KindFit:
    """seconds = scale * simulated + overhead * ops."""

    scale: float
    overhead: float


@dataclass(frozen=True)
class StepFit:
    """seconds = factor * simulated + per_op * ops + constant of the runtime."""

    factor: float
    per_op: float
    constants: dict[str, float]


def _noise(points: Sequence[RunPoint]) -> Array:
    """Relative standard deviation of each point: a run of weight w counts as w runs."""
    noise = np.maximum([point.noise for point in points], LEAST_NOISE)
    return np.asarray(noise / np.sqrt([point.weight for point in points]), dtype=np.float64)


def _columns(points: Sequence[RunPoint]) -> Array:
    """Simulated seconds, ops and measured seconds."""
    return np.array([[point.simulated, point.ops, point.seconds] for point in points], np.float64).T


def _solve(residuals: Any, start: list[float], lower: list[float], upper: list[float]) -> Array:
    """Robust bounded least squares of residuals in standard deviations; beyond two they count linearly."""
    found = least_squares(residuals, start, bounds=(lower, upper), loss="soft_l1", f_scale=2.0)
    return np.asarray(found.x, dtype=np.float64)


def distinct(points: Sequence[RunPoint]) -> bool:
    """Whether the runs tell a scale from an overhead per op."""
    per_op = [point.simulated / point.ops for point in points if point.ops]
    return len(per_op) >= 2 and max(per_op) > DISTINCT * min(per_op)


def fit_kind(points: Sequence[RunPoint], overhead_prior: float, floor: float) -> KindFit:
    """Scale, and overhead per op (never negative) where the runs are distinct, of one kind of work.

    overhead_prior: its standard deviation, seconds. floor: the least scale that physics allows. Every point's
    simulated time is positive.
    """
    base, ops, seconds = _columns(points)
    noise = _noise(points)
    with_overhead = distinct(points)

    def residuals(x: Array) -> Array:
        overhead = x[1] * overhead_prior if with_overhead else 0.0
        errors = np.log((np.exp(x[0]) * base + overhead * ops) / seconds) / noise
        return np.append(errors, [x[0] / SCALE_PRIOR, x[1]])

    low, high = np.log(max(floor, SCALES[0])), np.log(SCALES[1])
    start = float(np.clip(np.median(np.log(seconds / base)), low + 1e-6, high - 1e-6))
    x = _solve(residuals, [start, 0.1], [low, 0.0], [high, 1.0 / overhead_prior])
    return KindFit(float(np.exp(x[0])), float(x[1] * overhead_prior) if with_overhead else 0.0)


def fit_family(
    points: Mapping[str, Sequence[RunPoint]],
    overhead_priors: Mapping[str, float],
    floors: Mapping[str, float],
) -> tuple[float, dict[str, KindFit]]:
    """(scale of a family of kinds, fit of each kind that has points): one prior for all, which few points
    correct.

    A family's kinds go over the same wires, so that they err alike; what one run measures of one of them on
    a busy machine is worth little by itself. An overhead per op is fitted where the runs are distinct. Every
    point's simulated time is positive.
    """
    kinds = [kind for kind, found in points.items() if found]
    count, noises = len(kinds), [_noise(points[kind]) for kind in kinds]
    tables = [_columns(points[kind]) for kind in kinds]
    priors = [overhead_priors[kind] * distinct(points[kind]) for kind in kinds]

    def residuals(x: Array) -> Array:
        errors = []
        for i, (base, ops, seconds) in enumerate(tables):
            predicted = np.exp(x[0] + x[1 + i]) * base + x[1 + count + i] * priors[i] * ops
            errors.append(np.log(predicted / seconds) / noises[i])
        return np.concatenate([*errors, [x[0] / SCALE_PRIOR], x[1 : 1 + count] / KIN_PRIOR, x[1 + count :]])

    most = float(np.log(SCALES[1])) / 2
    x = _solve(
        residuals,
        [0.0] * (1 + count) + [0.1] * count,
        [-most] * (1 + count) + [0.0] * count,
        [most] * (1 + count) + [100.0] * count,
    )
    fits = {
        kind: KindFit(max(float(np.exp(x[0] + x[1 + i])), floors[kind]), float(x[1 + count + i] * priors[i]))
        for i, kind in enumerate(kinds)
    }
    return float(np.exp(x[0])), fits


def fit_step(points: Sequence[RunPoint], launch: float) -> StepFit:
    """What the kinds leave of the step, split by what is to be expected of each part.

    A cost per op (the executor's own Python; prior: some launch overheads), a constant per runtime (hooks,
    autograd, wrappers of tensors: work that differs between them and is in no op), and a factor on all. Two
    or more runs tell them apart; with one, the priors share it out.
    """
    runtimes = sorted({point.runtime for point in points})
    which = np.array([runtimes.index(point.runtime) for point in points])
    simulated, ops, seconds = _columns(points)
    noise, typical = _noise(points), float(np.median(seconds))

    def parts(x: Array) -> tuple[float, float, Array]:
        factor, per_op = float(np.exp(FACTOR_PRIOR * x[0])), float(PER_OP_PRIOR * launch * x[1])
        return factor, per_op, CONSTANT_PRIOR * typical * x[2:]

    def residuals(x: Array) -> Array:
        factor, per_op, constants = parts(x)
        predicted = factor * simulated + per_op * ops + constants[which]
        return np.append(np.log(np.maximum(predicted, 0.01 * seconds) / seconds) / noise, x)

    most = np.log(SCALES[1]) / FACTOR_PRIOR
    count = len(runtimes)
    x = _solve(
        residuals, [0.0, 0.1] + [0.1] * count, [-most, 0.0] + [0.0] * count, [most, 100.0] + [30.0] * count
    )
    factor, per_op, constants = parts(x)
    return StepFit(factor, per_op, dict(zip(runtimes, map(float, constants), strict=True)))


def scatter(values: Sequence[float]) -> float:
    """Relative standard deviation of a step, from the quartiles: what a busy machine adds is no error of the
    median that more steps would cure, so that a run whose steps scatter counts for little."""
    if len(values) < 4:
        return 0.0
    low, middle, high = np.quantile(np.array(values), [0.25, 0.5, 0.75])
    return float((high - low) / 1.349 / middle)
