"""Fits of MatmulCurve: dense products from latency tables, grouped products from rate tables."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from hardware_profiles.data.fit.tables import Array, Residuals, column, params, round_to

#: Columns and depth of the products whose longest are taken to be bounded by power.
_WIDE = 2048
#: Products of less arithmetic than this per byte, and of at least so many bytes, run at the memory's rate.
_STREAMING_INTENSITY, _STREAMING_BYTES = 70.0, 2e8


@dataclass(frozen=True)
class MatmulFit:
    """efficiency <= 1 of peak, sizes at half rate, the floor of a kernel in seconds, how well it fits; held:
    what power leaves of the peak in a step; held_wide: of 4 and 8 bytes, where that was measured on the
    tensor cores of 2 bytes, which they do without."""

    efficiency: float
    m_half: float
    n_half: float
    k_half: float
    floor: float
    residuals: Residuals
    residuals_large: Residuals
    held: float = 1.0
    held_wide: float | None = None


def _bytes(m: Array, n: Array, k: Array) -> Array:
    return 2 * (m * k + k * n + m * n)


def streaming_bandwidth(rows: list[dict[str, str]]) -> float:
    """Bytes/s that the skinny, large products of a table reach: the 90th percentile."""
    m, n, k, seconds = (column(rows, name) for name in ("m", "n", "k", "latency_s"))
    moved = _bytes(m, n, k)
    skinny = (2 * m * n * k / moved < _STREAMING_INTENSITY) & (moved > _STREAMING_BYTES)
    return round_to(float(np.quantile(moved[skinny] / seconds[skinny], 0.9)), 3)


def fit_matmul(rows: list[dict[str, str]], peak: float, bandwidth: float) -> MatmulFit:
    """MatmulCurve of a bf16 latency table by robust least squares of the log error; FLOP/s and bytes/s."""
    m, n, k, seconds = (column(rows, name) for name in ("m", "n", "k", "latency_s"))

    def errors(x: Array) -> Array:
        fill = m / (m + x[1]) * n / (n + x[2]) * k / (k + x[3])
        predicted = (
            np.maximum(2 * m * n * k / (peak * x[0] * fill), _bytes(m, n, k) / bandwidth) + x[4] * 1e-6
        )
        return np.asarray(np.log(predicted / seconds))

    result = least_squares(
        errors, [0.75, 50.0, 50.0, 150.0, 3.0], loss="soft_l1", f_scale=0.1,
        x_scale=[0.1, 50.0, 50.0, 100.0, 1.0],
        bounds=([0.1, 0.0, 0.0, 0.0, 0.0], [1.0, 4096.0, 4096.0, 4096.0, 50.0]),
    )  # fmt: skip
    x, error = result.x, errors(result.x)
    large = 2 * m * n * k > 1e11
    m_half, n_half, k_half = (round_to(float(value)) if value > 0.5 else 0.0 for value in x[1:4])
    return MatmulFit(
        round_to(float(x[0])),
        m_half,
        n_half,
        k_half,
        round_to(float(x[4]) * 1e-6, 3),
        Residuals.of(error),
        Residuals.of(error[large]),
        longest_rate(m, n, k, seconds, peak),
    )


def longest_rate(m: Array, n: Array, k: Array, seconds: Array, peak: float) -> float:
    """The fraction of peak that the products with the most rows reach: they run longest, so that power lowers
    the clock within them, and more rows are slower (on H100 0.744 with 4096, 0.715 with 16384)."""
    longest = (m == m.max()) & (n >= _WIDE) & (k >= _WIDE)
    if not longest.any():
        return 1.0
    rate = 2 * m[longest] * n[longest] * k[longest] / seconds[longest] / peak
    return round_to(float(np.median(rate)), 3)


def fit_grouped(rows: list[dict[str, str]], dense: MatmulFit, peak: float, bandwidth: float) -> MatmulFit:
    """Curve of grouped products (params M, N, K; FLOP/s): efficiency and m_half fitted, other halves kept.

    Forward and input-gradient products are pooled. Weight gradients have the rows inside (k), and traffic of
    their own (mopsim.cost.compute.EXPERT_GRADIENTS_EXPOSED).
    """
    rows = [row for row in rows if params(row)["stage"] != "bwd_grad_w"]
    shape = [params(row) for row in rows]
    m, n, k = (np.array([float(s[name]) for s in shape]) for name in ("M", "N", "K"))
    back = np.array([s["stage"] == "bwd_grad_act" for s in shape])
    n, k = np.where(back, k, n), np.where(back, n, k)
    seconds = 2 * m * n * k / column(rows, "value")

    def errors(x: Array) -> Array:
        fill = m / (m + x[1]) * n / (n + dense.n_half) * k / (k + dense.k_half)
        predicted = np.maximum(2 * m * n * k / (peak * x[0] * fill), _bytes(m, n, k) / bandwidth)
        return np.asarray(np.log(predicted / seconds) * np.ones_like(m))

    result = least_squares(
        errors,
        [0.5, 200.0],
        loss="soft_l1",
        f_scale=0.1,
        x_scale=[0.1, 100.0],
        bounds=([0.1, 0.0], [1.0, 4096.0]),
    )
    fitted = Residuals.of(errors(result.x))
    efficiency, m_half = (round_to(float(value)) for value in result.x)
    return MatmulFit(efficiency, m_half, dense.n_half, dense.k_half, dense.floor, fitted, fitted)


def table_efficiency(rows: list[dict[str, str]], dense: MatmulFit, peak: float) -> tuple[float, Residuals]:
    """Efficiency that lays a dense curve's shape over a rate table (params m, n, k; FLOP/s), by median."""
    shape = [params(row) for row in rows]
    m, n, k = (np.array([float(s[name]) for s in shape]) for name in ("m", "n", "k"))
    fill = m / (m + dense.m_half) * n / (n + dense.n_half) * k / (k + dense.k_half)
    ratio = column(rows, "value") / (peak * fill)
    efficiency = float(np.exp(np.median(np.log(ratio))))
    return round_to(min(efficiency, 1.0)), Residuals.of(np.asarray(np.log(ratio / efficiency)))


def held_rate(
    rows: list[dict[str, str]], dense: MatmulFit, peak: float, bandwidth: float
) -> tuple[float, Residuals]:
    """The fraction of peak that bounds a microbenchmark's curve over a sweep of large products (params m, n,
    k; FLOP/s): there power limits the clock, which a microbenchmark of few repetitions does not show."""
    shape = [params(row) for row in rows]
    m, n, k = (np.array([float(s[name]) for s in shape]) for name in ("m", "n", "k"))
    rate = column(rows, "value") / peak
    fill = m / (m + dense.m_half) * n / (n + dense.n_half) * k / (k + dense.k_half)
    work = 2 * m * n * k / peak

    def errors(held: float) -> Array:
        seconds = np.maximum(work / np.minimum(dense.efficiency * fill, held), _bytes(m, n, k) / bandwidth)
        return np.asarray(np.log((seconds + dense.floor) * rate / work))

    found = minimize_scalar(
        lambda x: float(np.abs(errors(x)).sum()), bounds=(0.1, dense.efficiency), method="bounded"
    )
    return round_to(float(found.x), 3), Residuals.of(errors(float(found.x)))


def best_rates(rows: list[dict[str, str]], gpu: str) -> dict[str, float]:
    """FLOP/s of the best product of a shape search on `gpu`, by dtype ("bf16", "fp8")."""
    found = [row for row in rows if row["gpu"] == gpu and row["system"].startswith("best matmul")]
    return {params(row)["precision"]: float(row["value"]) for row in found}
