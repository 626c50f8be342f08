"""Curves of a hardware profile fitted to timed samples, robustly and in log space. No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
"""(m, n, k) of C[m,n] = A[m,k] B[k,n]."""

Array = NDArray[np.float64]
LOG_SCALE = 0.15
"""Residuals beyond about 15 % count as outliers (soft L1)."""


@dataclass(frozen=True)
class MatmulFit:
    """rate: FLOP/s at large sizes (asymptote). best: the highest FLOP/s seen. error: median, relative."""

    rate: float
    best: float
    m_half: float
    n_half: float
    k_half: float
    error: float


@dataclass(frozen=True)
class LineFit:
    """seconds = latency + size / bandwidth. error: median relative error of the fit."""

    latency: float
    bandwidth: float
    error: float


@dataclass(frozen=True)
class AttentionFit:
    """FLOP/s at long sequences, forward and backward; the length at which half of it is reached."""

    forward: float
    backward: float
    seq_half: float
    error: float


def _minimize(
    residuals: Any, start: Sequence[float], lower: Sequence[float], upper: Sequence[float]
) -> Array:
    from scipy.optimize import least_squares  # takes long to import, and ranks fit nothing

    inside = np.clip(start, np.asarray(lower) + 1e-9, np.asarray(upper) - 1e-9)
    solution = least_squares(residuals, inside, bounds=(lower, upper), loss="soft_l1", f_scale=LOG_SCALE)
    return np.asarray(solution.x, dtype=np.float64)


def _median_error(log_residuals: Array) -> float:
    return float(np.median(np.abs(np.expm1(log_residuals))))


def fit_line(points: Iterable[tuple[float, float]]) -> LineFit:
    """Fit (size, seconds) points; both terms positive, every point weighs the same relatively."""
    sizes, times = np.array(sorted(points), dtype=float).T
    slope = max(float((times[-1] - times[0]) / (sizes[-1] - sizes[0])), float(times[-1] / sizes[-1]) * 1e-2)

    def residuals(x: Array) -> Array:
        return np.asarray(np.log(np.exp(x[0]) + np.exp(x[1]) * sizes) - np.log(times))

    start = [np.log(max(float(times.min()) * 0.5, 1e-9)), np.log(slope)]
    x = _minimize(
        residuals,
        start,
        [np.log(1e-10), start[1] - 7],
        [np.log(max(float(times.max()), 1e-9)) + 1, start[1] + 7],
    )
    return LineFit(float(np.exp(x[0])), float(np.exp(-x[1])), _median_error(residuals(x)))


def fit_matmul(seconds: Mapping[Shape, Sequence[float]], bandwidth: float, item: float) -> MatmulFit:
    """Fit MatmulCurve's form to shape -> seconds (several layouts of one shape may be given).

    bandwidth: bytes/s of the memory-bound side. item: bytes per element. The fixed cost of a call is fitted
    beside the curve and left out of it: in the profile the launch overhead stands for it.
    """
    shapes = np.array([shape for shape, times in seconds.items() for _ in times], dtype=float)
    times = np.array([t for all_times in seconds.values() for t in all_times])
    m, n, k = shapes.T
    flops, traffic = 2 * m * n * k, item * (m * n + m * k + n * k) / bandwidth
    best = float((flops / times).max())

    def curve(x: Array) -> Array:
        halves = np.exp(x[2:])
        inverse = (1 + halves[0] / m) * (1 + halves[1] / n) * (1 + halves[2] / k)
        return np.asarray(np.exp(x[0]) + np.maximum(flops / np.exp(x[1]) * inverse, traffic))

    def residuals(x: Array) -> Array:
        prior = 0.02 * (x[2:] - np.log(8.0))  # keeps an unidentified half size from drifting
        return np.concatenate([np.log(curve(x)) - np.log(times), prior])

    start = [np.log(2e-6), np.log(best), np.log(8.0), np.log(8.0), np.log(8.0)]
    lower = [np.log(1e-7), np.log(best * 0.5), *[np.log(1e-2)] * 3]
    upper = [np.log(max(float(times.min()), 3e-7)), np.log(best * 1.5), *[np.log(4096.0)] * 3]
    x = _minimize(residuals, start, lower, upper)
    halves = np.exp(x[2:])
    m_half, n_half, k_half = (float(half) for half in halves)
    return MatmulFit(float(np.exp(x[1])), best, m_half, n_half, k_half, _median_error(residuals(x)[:-3]))


def fit_attention(
    forward: Mapping[int, tuple[float, float]], backward: Mapping[int, tuple[float, float]]
) -> AttentionFit:
    """Fit length -> (FLOP, seconds) of both directions to rate * s / (s + seq_half) and a fixed cost."""
    lengths = np.array([*forward, *backward], dtype=float)
    flops, times = np.array([*forward.values(), *backward.values()]).T
    is_backward = np.arange(len(lengths)) >= len(forward)
    best = [float(max(f / t for f, t in side.values())) for side in (forward, backward)]

    def residuals(x: Array) -> Array:
        rate = np.where(is_backward, np.exp(x[1]), np.exp(x[0]))
        fixed = np.where(is_backward, np.exp(x[4]), np.exp(x[3]))
        return np.asarray(np.log(fixed + flops / rate * (1 + np.exp(x[2]) / lengths)) - np.log(times))

    start = [np.log(best[0]), np.log(best[1]), np.log(64.0), np.log(1e-5), np.log(1e-5)]
    lower = [start[0] - 1, start[1] - 1, np.log(1e-2), np.log(1e-7), np.log(1e-7)]
    upper = [start[0] + 0.4, start[1] + 0.4, np.log(4096.0), np.log(1e-3), np.log(1e-3)]
    x = _minimize(residuals, start, lower, upper)
    return AttentionFit(
        float(np.exp(x[0])), float(np.exp(x[1])), float(np.exp(x[2])), _median_error(residuals(x))
    )


def split_latency(by_ranks: Mapping[int, float]) -> tuple[float, float, bool]:
    """(latency, latency per rank, measured?) from each group size's cost: latency + ranks * latency per rank.

    One group size cannot tell the two apart: half is then ascribed to each, and measured is False.
    """
    sizes = sorted(by_ranks)
    if len(sizes) == 1:
        return by_ranks[sizes[0]] / 2, by_ranks[sizes[0]] / 2 / sizes[0], False
    small, large = sizes[0], sizes[-1]
    per_rank = max((by_ranks[large] - by_ranks[small]) / (large - small), 0.0)
    return max(by_ranks[small] - small * per_rank, 0.0), per_rank, True


def overlap_loss(together: float, compute: float, communication: float) -> float:
    """communication_share: compute throughput lost while a collective runs beside it.

    `compute` >= `communication`, each alone; together = compute + share * communication.
    """
    return min(max((together - compute) / communication, 0.0), 1.0)
