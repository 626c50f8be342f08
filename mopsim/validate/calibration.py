"""Calibration of a software stack on a machine: a scale, a cost per launch, a constant; scored on models it
never saw."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

NOISE = 0.05
"""Relative scatter of repeated runs of one job: the unit in which departures from the prior are weighed."""
PRIOR = {"scale": 0.3, "launch": 0.1, "constant": 0.1}
"""Prior standard deviations: of the scale about 1, and of what launches and the constant add, as a share of
a step."""
ROUNDS = 12


@dataclass(frozen=True)
class Point:
    """One run: simulated seconds, launches, measured seconds, and the network it trained."""

    simulated: float
    launches: int
    measured: float
    model: str


@dataclass(frozen=True)
class Fit:
    """seconds = scale * simulated + launch * launches + constant. runs: it was fitted on."""

    scale: float = 1.0
    launch: float = 0.0
    constant: float = 0.0
    runs: int = 0

    def apply(self, point: Point) -> float:
        """Predicted seconds of a step."""
        return self.scale * point.simulated + self.launch * point.launches + self.constant


def fit(points: Sequence[Point]) -> Fit:
    """Least absolute relative error, each network with equal weight, drawn towards (1, 0, 0) by PRIOR."""
    if not points:
        return Fit()
    measured = np.array([p.measured for p in points])
    design = np.array([[p.simulated, p.launches, 1.0] for p in points]) / measured[:, None]
    counts = Counter(p.model for p in points)
    weight = np.array([1.0 / counts[p.model] for p in points]) * len(points) / len(counts)
    typical = np.median(design, axis=0)
    pull = np.array([1.0, typical[1], typical[2]]) * NOISE / np.array(list(PRIOR.values()))
    prior = np.array([pull[0], 0.0, 0.0])
    errors = np.ones(len(points)) * NOISE
    found = np.array([1.0, 0.0, 0.0])
    for _ in range(ROUNDS):
        root = np.sqrt(weight * NOISE / np.maximum(np.abs(errors), NOISE / 5))
        found, _residual = nnls(
            np.vstack([design * root[:, None], np.diag(pull)]), np.concatenate([root, prior])
        )
        errors = design @ found - 1.0
    return Fit(float(found[0]), float(found[1]), float(found[2]), len(points))


def held_out(points: Sequence[Point]) -> list[Fit]:
    """For each point, the fit on the points of all other networks; Fit() (uncalibrated) where there are
    none."""
    by_model = {model: fit([p for p in points if p.model != model]) for model in {p.model for p in points}}
    return [by_model[p.model] for p in points]
