"""The rounds of kernels that send rows within a node a few at a time (DeepEP's), by architecture."""

from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from hardware_profiles.data.fit.tables import Array, Residuals, column, read_csv, round_to

TABLE = Path(__file__).parents[1] / "dispatch_in_node.csv"
COLUMNS = ("gpu", "ranks", "sms", "chunk", "row_bytes", "gb_per_s")
CARDS = {"hopper": "h200_sxm", "blackwell": "b200_sxm"}
"""The card that was timed, of each architecture."""


def fit_rounds(card: str) -> tuple[float, float, Residuals]:
    """Seconds that a chunk waits and bytes/s of a channel's copies, which its peers share. Robust least
    squares of the log error of the rate: every channel (two SMs) sends each peer a chunk in
    wait + chunk * ranks / copy."""
    rows = [row for row in read_csv(TABLE, COLUMNS) if row["gpu"] == card]
    ranks, sms, chunk, row, rate = (column(rows, name) for name in COLUMNS[1:])

    def errors(x: Array) -> Array:
        seconds = 1e-6 * x[0] + chunk * row * ranks / (1e9 * x[1])
        return np.asarray(np.log(ranks * sms / 2 * chunk * row / seconds / (1e9 * rate)))

    x = least_squares(errors, [9.0, 50.0], loss="soft_l1", f_scale=0.1, bounds=([0.1, 5], [100, 1000])).x
    return round_to(float(x[0]), 3) * 1e-6, round_to(float(x[1]), 3) * 1e9, Residuals.of(errors(x))
