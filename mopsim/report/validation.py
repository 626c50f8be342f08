"""Figures of a validation: predicted against measured, by source."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from mopsim.common.units import UNITS
from mopsim.report.style import SERIES, figure
from mopsim.validate.run import Validation
from mopsim.validate.scoring import Scored

Points = list[tuple[float, float]]
"""(measured, predicted)."""
BAND = 0.1
"""Relative error that the grey band shows."""


def figures(folder: Path, validation: Validation) -> list[Path]:
    """Write the figures that there are points for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return by(folder, validation, "source", lambda one: one.case.source.name, spread)


def by(
    folder: Path, validation: Validation, name: str, key: Callable[[Scored], str],
    title: Callable[[str, Mapping[str, Points]], str],
) -> list[Path]:  # fmt: skip
    """Step times and peaks by group. title: of a quantity and its groups."""
    times: dict[str, Points] = defaultdict(list)
    peaks: dict[str, Points] = defaultdict(list)
    for one in validation.scored:
        measured = one.case.measured
        if measured.step_time:
            times[key(one)].append((measured.step_time, one.calibrated))
        if measured.peak_memory:
            peaks[key(one)].append((measured.peak_memory / UNITS["GiB"], one.peak_memory / UNITS["GiB"]))
    asked = (("step_time", times, "seconds of a step"), ("peak_memory", peaks, "GiB at the peak"))
    return [
        scatter(folder / f"{quantity}_by_{name}.png", groups, unit, title(quantity, groups))
        for quantity, groups, unit in asked
        if groups
    ]


def spread(name: str, groups: Mapping[str, Points]) -> str:
    """The groups with the smallest and the largest mean error."""
    words = name.replace("_", " ").capitalize()
    means = sorted((mean_error(points), key) for key, points in groups.items())
    (least, best), (most, worst) = means[0], means[-1]
    if len(means) == 1:
        return f"{words}: {best} {least:.1%} mean error"
    return f"{words}: mean error from {least:.1%} ({best})\nto {most:.1%} ({worst})"


def mean_error(points: Points) -> float:
    """Mean relative error, its sign apart."""
    return fmean(abs(predicted / measured - 1) for measured, predicted in points)


def scatter(path: Path, groups: Mapping[str, Points], unit: str, title: str) -> Path:
    """Measured on the horizontal, predicted on the vertical axis, both logarithmic; the diagonal and a
    band."""
    with figure(path, 8.5, 7) as (axis,):
        for index, (name, points) in enumerate(sorted(groups.items())):
            axis.scatter(
                [p[0] for p in points], [max(p[1], 1e-12) for p in points], s=22, alpha=0.7,
                color=SERIES[index % len(SERIES)], marker="os^Dvx+"[index // len(SERIES) % 7],
                label=f"{name}: {len(points)}, {mean_error(points):.0%}",
            )  # fmt: skip
        values = [value for points in groups.values() for pair in points for value in pair if value > 0]
        _diagonal(axis, min(values), max(values))
        axis.set(
            xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}", title=title
        )
        if unit.startswith("GiB"):
            for one in (axis.xaxis, axis.yaxis):
                one.set_major_formatter(LogFormatter())
                one.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axis.legend(
            loc="upper left", fontsize=8, title="runs of every grade, their mean error", title_fontsize=8
        )
    return path


def _diagonal(axis: Axes, low: float, high: float) -> None:
    low, high = low / math.sqrt(2), high * math.sqrt(2)
    axis.plot([low, high], [low, high], color="#515a5a", linewidth=1)
    axis.fill_between(
        [low, high], [low * (1 - BAND), high * (1 - BAND)], [low * (1 + BAND), high * (1 + BAND)],
        color="#bfc9ca", alpha=0.5, linewidth=0, zorder=0, label=f"within {BAND:.0%} of measured",
    )  # fmt: skip
