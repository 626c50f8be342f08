"""The curve of kernels that send a row once to a node and on to its ranks there (DeepEP's), over NICs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from hardware_profiles.data.fit.collectives import CollectiveFit
from hardware_profiles.data.fit.tables import Array, Residuals, column, read_csv, round_to

TABLE = Path(__file__).parents[1] / "dispatch_over_nodes.csv"
Rows = list[dict[str, str]]
_BEST = ("kernels", "op", "num_gpus")


def rows() -> Rows:
    return read_csv(TABLE, ("network", "chunks", "sent_bytes", "seconds", "gb_per_s", *_BEST))


def fit_dispatch(name: str, table: Rows) -> tuple[CollectiveFit, str] | None:
    """Of the network `name`, and how it was had; None where nobody timed it. Where a dispatch and a combine
    were timed as a program calls them, with the kernels' default chunks: a delay of each and a rate. Else
    that of the network that was, by what the kernels' tests reach with their best chunks on both."""
    called = [row for row in table if row["chunks"] == "default"]
    of = {row["network"] for row in called}
    if name in of:
        mine = [row for row in called if row["network"] == name]
        kernels = " and ".join(sorted({row["kernels"] for row in mine}))
        return _fit(mine), f"fitted to the {name} rows of {TABLE.name}, of default chunks ({kernels})"
    best = _rates(table, name)
    for known in sorted(of):
        other = _rates(table, known)
        ratios = [best[key] / other[key] for key in best if key in other]
        if ratios:
            times, nothing = float(np.median(ratios)), Residuals(0, 0.0, 0.0, 0.0)
            fit = _fit([row for row in called if row["network"] == known])
            why = f"rate times {times:.3g}: the same kernels' tests, best chunks of both"
            rate = round_to(fit.bandwidth * times)
            return (
                replace(fit, bandwidth=rate, residuals=nothing, residuals_large=nothing),
                f"fitted to the {known} rows of {TABLE.name}, {why}",
            )
    return None


def _rates(table: Rows, name: str) -> dict[tuple[str, ...], float]:
    mine = [row for row in table if (row["network"], row["chunks"]) == (name, "tuned")]
    return {tuple(row[key] for key in _BEST): float(row["gb_per_s"]) for row in mine}


def _fit(mine: Rows) -> CollectiveFit:
    """Robust least squares of the log error of two exchanges: 2 * latency + sent / bandwidth."""
    sent, seconds = column(mine, "sent_bytes"), column(mine, "seconds")

    def errors(x: Array) -> Array:
        return np.asarray(np.log((2e-3 * x[0] + sent / (1e9 * x[1])) / seconds))

    x = least_squares(errors, [0.3, 35.0], loss="soft_l1", f_scale=0.1, bounds=([0, 1], [10, 1000])).x
    found = Residuals.of(errors(x))
    return CollectiveFit(round_to(float(x[0]) * 1e-3, 3), 0.0, round_to(float(x[1]) * 1e9), 0.0, found, found)
