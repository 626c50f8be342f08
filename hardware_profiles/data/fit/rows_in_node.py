"""The rounds of kernels that send rows within a node a few at a time (DeepEP's), by architecture."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from hardware_profiles.data.fit.tables import Array, Residuals, column, read_csv, round_to

TABLE = Path(__file__).parents[1] / "dispatch_in_node.csv"
NUMBERS = ("ranks", "sms", "chunk", "rows", "row_bytes", "gb_per_s")
CARDS = {"hopper": ("h200_sxm", "h100_sxm"), "blackwell": ("b200_sxm",)}
"""The cards that were timed, of each architecture."""
STARTS = ((8.0, 60.0, 0.05, 280.0), (8.0, 100.0, 0.05, 400.0), (8.0, 300.0, 0.05, 500.0))
"""us, GB/s, us, GB/s: see RoundsFit."""
BOUNDS = ((0.1, 5.0, 0.0, 100.0), (100.0, 1e4, 5.0, 900.0))

Row = dict[str, str]


@dataclass(frozen=True)
class RoundsFit:
    """Rounds (mopsim.spec.hardware) in SI units; link: inf where no timing is bound by it. others: of each
    page, the residuals of what the others' timings say."""

    wait: float
    copy: float
    row: float
    link: float
    residuals: Residuals
    others: dict[str, Residuals]


def fit_rounds(cards: Iterable[str]) -> RoundsFit:
    """Robust least squares of the log error of the rate over all rows of the cards. With a bound of the
    links where pages are better met by the others' timings with it than without."""
    wanted = set(cards)
    rows = [row for row in read_csv(TABLE, ("gpu", "page", *NUMBERS)) if row["gpu"] in wanted]
    with_link, without = _left_out(rows, linked=True), _left_out(rows, linked=False)
    linked = _off(with_link) < _off(without)
    x = _fitted(rows, linked=linked)
    others = with_link if linked else without
    return RoundsFit(
        wait=round_to(float(x[0]), 3) * 1e-6, copy=round_to(float(x[1]), 3) * 1e9,
        row=round(float(x[2]), 3) * 1e-6, link=round_to(float(x[3]), 3) * 1e9 if linked else np.inf,
        residuals=Residuals.of(_errors(x, rows, linked=linked)),
        others={page: Residuals.of(errors) for page, errors in others.items()},
    )  # fmt: skip


def _left_out(rows: list[Row], *, linked: bool) -> dict[str, Array]:
    """By page, the errors of its timings by a fit to the other pages."""
    found = {}
    for page in dict.fromkeys(row["page"] for row in rows):
        own = [row for row in rows if row["page"] == page]
        x = _fitted([row for row in rows if row["page"] != page], linked=linked)
        found[page] = _errors(x, own, linked=linked)
    return found


def _off(errors: dict[str, Array]) -> float:
    """Pages alike."""
    return float(np.mean([np.mean(np.abs(one)) for one in errors.values()]))


def _fitted(rows: list[Row], *, linked: bool) -> Array:
    def errors(x: Array) -> Array:
        return _errors(x, rows, linked=linked)

    fits = [
        least_squares(errors, start, loss="soft_l1", f_scale=0.1, bounds=BOUNDS, x_scale=STARTS[0])
        for start in STARTS
    ]
    return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)


def _errors(x: Array, rows: list[Row], *, linked: bool) -> Array:
    """Log of the rate by mopsim.cost.communication over that measured."""
    ranks, sms, chunk, count, width, rate = (column(rows, name) for name in NUMBERS)
    wait, copy, row, link = 1e-6 * x[0], 1e9 * x[1], 1e-6 * x[2], 1e9 * x[3]
    channels = sms / 2
    seconds = count / channels * (wait / (ranks * chunk) + width / copy + row)
    if linked:
        seconds = np.maximum(seconds, count * width * (ranks - 1) / ranks / link)
    seconds = seconds * (1 + ranks * channels * chunk / count)
    return np.asarray(np.log(count * width / seconds / (1e9 * rate)))
