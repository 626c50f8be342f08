"""Calibration of a software stack on a machine: a scale, a cost per launch, a constant.

A host that issues kernels more slowly than the device runs them sets the pace, so launches count where they
take longer than the kernels, not on top of them: seconds = max(scale * simulated, launch * paced launches) +
constant. Scored on networks that the fit never saw.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

NOISE = 0.05
"""Relative scatter of repeated runs of one job: the unit in which departures from the prior are weighed."""
SCALE_PRIOR = 0.3
"""Standard deviation of the scale about 1."""
LAUNCH_PRIOR, LAUNCH_LIMIT = 20e-6, 100e-6
"""Seconds a launch: of an eager framework of that order; beyond the limit it is not a launch any more."""
CONSTANT_PRIOR = 0.05
"""Standard deviation of the constant, as a share of the shortest step."""
STARTS = (1e-6, 1e-5, 4e-5)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One run. simulated: s; launches: kernels of the busiest rank, times step over active seconds (a host
    that is slow in every stage stretches the pipeline's idle time too); measured: s; model: the network it
    trained.
    """

    simulated: float
    launches: float
    measured: float
    model: str


@dataclass(frozen=True)
class Fit:
    """seconds = max(scale * simulated, launch * launches) + constant. runs: it was fitted on."""

    scale: float = 1.0
    launch: float = 0.0
    constant: float = 0.0
    runs: int = 0

    def apply(self, point: Point) -> float:
        """Predicted seconds of a step."""
        return max(self.scale * point.simulated, self.launch * point.launches) + self.constant


def fit(points: Sequence[Point]) -> Fit:
    """Robust relative error, each network with equal weight, drawn towards (1, 0, 0) by the priors."""
    if not points:
        return Fit()
    measured = np.array([p.measured for p in points])
    simulated = np.array([p.simulated for p in points]) / measured
    launches = np.array([p.launches for p in points]) / measured
    counts = Counter(p.model for p in points)
    weight = np.sqrt([len(points) / len(counts) / counts[p.model] for p in points])
    shortest = float(measured.min())

    def residuals(x: Array) -> Array:
        predicted = np.maximum(x[0] * simulated, x[1] * 1e-6 * launches) + x[2] * shortest / measured
        prior = [(x[0] - 1) / SCALE_PRIOR, x[1] * 1e-6 / LAUNCH_PRIOR, x[2] / CONSTANT_PRIOR]
        return np.concatenate([weight * _robust((predicted - 1) / NOISE), prior])

    best = None
    for start in STARTS:
        found = least_squares(
            residuals, [1.0, start * 1e6, 0.0], bounds=([0.2, 0.0, 0.0], [5.0, LAUNCH_LIMIT * 1e6, 0.5])
        )
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    scale, launch, constant = (float(value) for value in best.x)
    return Fit(scale, launch * 1e-6, constant * shortest, len(points))


def _robust(z: Array) -> Array:
    """Root of the soft-L1 loss with the sign of z: large errors count by their size, not its square."""
    return np.asarray(np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z**2) - 1)))


def held_out(points: Sequence[Point], usable: Sequence[bool] = ()) -> list[Fit]:
    """For each point, the fit on the usable points of all other networks; Fit() (uncalibrated) without any.

    usable: whether a point may be fitted on (all, where not given).
    """
    known = [p for p, use in zip(points, usable or [True] * len(points), strict=True) if use]
    by_model = {model: fit([p for p in known if p.model != model]) for model in {p.model for p in points}}
    return [by_model[p.model] for p in points]
