"""Calibration of a software stack on a machine: a scale, a cost per launch, a constant.

The cost per launch is the time of the host thread for each kernel, which the engine plays: seconds of a step
as a function of it come from a few simulations, straight lines between. If everything takes twice as long, so
does the step: seconds(scale, launch) = scale * step(launch / scale) + constant. Scored on networks that the
fit never saw.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mopsim.intervals.errors import known_errors

SHARED = ("common", "stack", "hardware", "precision", "source")
"""Levels of errors (mopsim.intervals.errors) that all runs of a software stack on a machine have in common:
the prior of its scale."""
NETWORKS = ("network", "source_network")
"""Those that the runs of one network have in common beside."""
LAUNCH, LAUNCH_PRIOR, LAUNCH_LIMIT = 13.5e-6, 5e-6, 100e-6
"""Seconds a launch: of the profiles, its standard deviation, and where it is not a launch any more."""
CONSTANT_PRIOR, CONSTANT_SHARE = 20e-3, 0.05
"""Standard deviation of the constant, seconds, but no more than this share of the shortest step: what a host
does once in a step."""
STARTS = (1e-6, 1e-5, 4e-5)

HoldOut = Literal["source", "model", "none"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class PacedRun:
    """One run. simulated: s, on the profile as it is; paces: (s of the host a launch, s of the step), by
    rising cost, empty where the host does not matter; measured: s; model: the network it trained.
    """

    simulated: float
    paces: tuple[tuple[float, float], ...]
    measured: float
    model: str

    def step(self, launch: float) -> float:
        """Seconds of a step if the host takes `launch` seconds for each kernel; beyond the last simulation as
        between the last two."""
        if len(self.paces) < 2:
            return self.simulated
        costs = [cost for cost, _ in self.paces]
        place = min(max(int(np.searchsorted(costs, launch)), 1), len(costs) - 1)
        (c0, t0), (c1, t1) = self.paces[place - 1 : place + 1]
        return t0 + (t1 - t0) * (launch - c0) / (c1 - c0)


@dataclass(frozen=True)
class Fit:
    """seconds = scale * step(launch / scale) + constant. runs: it was fitted on; 0: as simulated."""

    scale: float = 1.0
    launch: float = LAUNCH
    constant: float = 0.0
    runs: int = 0

    def apply(self, point: PacedRun) -> float:
        """Predicted seconds of a step."""
        if not self.runs:
            return point.simulated
        return self.scale * point.step(self.launch / self.scale) + self.constant


def fit(points: Sequence[PacedRun], issue: float = LAUNCH, new: bool = False) -> Fit:
    """Robust relative error, drawn towards (1, issue, 0) by the priors. Each network is one observation: what
    its runs have in common is off from the scale as the errors of published runs are, and each run beside.

    issue: seconds of the host a launch on the profile that the points were simulated on. new: nothing was
    learned from the source before.
    """
    if not points:
        return Fit()
    measured = np.array([p.measured for p in points])
    counts = Counter(p.model for p in points)
    runs = np.array([counts[p.model] for p in points])
    deviations = known_errors().step_time.deviations
    scatter = np.sqrt(deviations.of(*NETWORKS) ** 2 + deviations.run**2 / runs)
    prior_scale = deviations.of(*SHARED, *(["unseen"] * new))
    shortest = float(measured.min())
    deviation = min(CONSTANT_PRIOR, CONSTANT_SHARE * shortest)

    def residuals(x: Array) -> Array:
        tried = Fit(x[0], x[1] * 1e-6, x[2] * deviation, len(points))
        predicted = np.array([tried.apply(p) for p in points]) / measured
        prior = [(x[0] - 1) / prior_scale, (x[1] * 1e-6 - issue) / LAUNCH_PRIOR, x[2]]
        return np.concatenate([_robust((predicted - 1) / scatter) / np.sqrt(runs), prior])

    from scipy.optimize import least_squares  # takes long to import, and a simulation fits nothing

    bounds = ([0.2, 0.0, 0.0], [5.0, LAUNCH_LIMIT * 1e6, 10.0])
    found = (least_squares(residuals, [1.0, start * 1e6, 0.0], bounds=bounds) for start in STARTS)
    scale, launch, constant = map(float, min(found, key=lambda one: one.cost).x)
    return Fit(scale, launch * 1e-6, constant * deviation, len(points))


def _robust(z: Array) -> Array:
    """Root of the soft-L1 loss with the sign of z: large errors count by their size, not its square."""
    return np.asarray(np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z**2) - 1)))


def held_out(
    points: Sequence[PacedRun],
    usable: Sequence[bool] = (),
    issue: float = LAUNCH,
    hold_out: HoldOut = "model",
    new: bool = False,
) -> list[Fit]:
    """For each point, the fit on the usable points that it may have learned from; Fit() (uncalibrated)
    without any.

    usable: whether a point may be fitted on (all, where not given). issue, new: see `fit`. hold_out: `model`,
    all other networks; `source`, nothing of the same source, which all points are of; `none`, all, its own
    too.
    """
    if hold_out == "source":
        return [Fit() for _ in points]
    known = [p for p, use in zip(points, usable or [True] * len(points), strict=True) if use]
    if hold_out == "none":
        return [fit(known, issue, new)] * len(points)
    models = {p.model for p in points}
    by_model = {model: fit([p for p in known if p.model != model], issue, new) for model in models}
    return [by_model[p.model] for p in points]
