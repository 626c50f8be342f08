"""Figures of a validation: predicted against measured, by source."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from mopsim.common.units import UNITS
from mopsim.intervals.errors import Name
from mopsim.report.palette import SERIES
from mopsim.report.style import figure
from mopsim.validate.run import Validation
from mopsim.validate.scored import Scored

Points = list[tuple[float, float]]
"""(measured, predicted)."""
Ends = Mapping[tuple[float, float], tuple[float, float]]
"""Of a point, the ends of its prediction's interval."""
BAND = 0.1
"""Relative error that the grey band shows."""
MOST = 24
"""Groups with a colour and a name, where there are more those that are furthest off; the others are grey."""


def figures(folder: Path, validation: Validation, level: float | None = None) -> None:
    """Write the figures that there are points for. level: of the intervals, if any are
    drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    by(folder, validation, "source", lambda one: one.case.source.name, spread, level)


def by(
    folder: Path, validation: Validation, name: str, key: Callable[[Scored], str],
    title: Callable[[str, Mapping[str, Points]], str], level: float | None = None,
    runs: Callable[[str], Iterable[Scored]] | None = None,
) -> None:  # fmt: skip
    """Step times and peaks by group. title: of a quantity and its groups. level: as of `figures`. runs: those
    of a quantity that are drawn, where not all are."""
    asked: tuple[tuple[Name, str, float], ...] = (
        ("step_time", "seconds of a step", 1.0), ("peak_memory", "GiB at the peak", UNITS["GiB"]),
    )  # fmt: skip
    for quantity, unit, scale in asked:
        groups: dict[str, Points] = defaultdict(list)
        ends: dict[tuple[float, float], tuple[float, float]] = {}
        for one in runs(quantity) if runs else validation.scored:
            measured = getattr(one.case.measured, quantity)
            if measured:
                point = measured / scale, one.predicted(quantity) / scale
                groups[key(one)].append(point)
                if level:
                    low, high = one.interval(quantity, level)
                    ends[point] = low / scale, high / scale
        if groups:
            path = folder / f"{quantity}_by_{name}.png"
            scatter(path, groups, unit, title(quantity, groups), ends)


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


def drawn_groups(groups: Mapping[str, Points]) -> dict[str, Points]:
    """The groups by name; of more than MOST those that are furthest off, then all others as one."""
    if len(groups) <= MOST:
        return dict(sorted(groups.items()))
    order = sorted(groups, key=lambda name: mean_error(groups[name]), reverse=True)
    rest = [point for name in order[MOST:] for point in groups[name]]
    named = {name: groups[name] for name in sorted(order[:MOST])}
    left = len(order) - MOST
    return named | {f"{left} other{'s' * (left > 1)}, less far off": rest}


def scatter(
    path: Path, groups: Mapping[str, Points], unit: str, title: str, ends: Ends | None = None
) -> None:
    """Measured on the horizontal, predicted on the vertical axis, both logarithmic; the diagonal and a
    band. ends: of a line through a point, its interval."""
    drawn = [*drawn_groups(groups).items()]
    with figure(path, 11, 7) as (axis,):
        for index, (name, points) in enumerate(drawn):
            tint = SERIES[index % len(SERIES)] if index < MOST else "#aab2b9"
            axis.scatter(
                [p[0] for p in points], [max(p[1], 1e-12) for p in points], s=22, alpha=0.7,
                color=tint, marker="os^Dvx+"[index // len(SERIES)], zorder=3 if index < MOST else 2,
                label=f"{name}: {len(points)}, {mean_error(points):.0%}",
            )  # fmt: skip
            known = [(x, *ends[x, y]) for x, y in points if ends and (x, y) in ends]
            axis.vlines(
                [x for x, _, _ in known], [low for _, low, _ in known], [high for _, _, high in known],
                color=tint, alpha=0.35, linewidth=1,
            )  # fmt: skip
        values = [value for points in groups.values() for pair in points for value in pair if value > 0]
        _diagonal(axis, min(values), max(values))
        axis.set(
            xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}", title=title
        )
        for one in (axis.xaxis, axis.yaxis):
            if unit.startswith("GiB"):
                one.set_major_formatter(LogFormatter())
                one.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            elif unit == "seconds of a step":
                one.set_major_formatter("{x:,g}")
                one.set_minor_formatter(_Seconds(minor_thresholds=(1, 0.4)))
        axis.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0,
            fontsize=8, title="runs, the mean of their errors", title_fontsize=8,
        )  # fmt: skip


class _Seconds(LogFormatter):
    """Numbers as they are beside a logarithmic axis: no powers of ten."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:,g}"


def _diagonal(axis: Axes, low: float, high: float) -> None:
    low, high = low / math.sqrt(2), high * math.sqrt(2)
    axis.plot([low, high], [low, high], color="#515a5a", linewidth=1)
    axis.fill_between(
        [low, high], [low * (1 - BAND), high * (1 - BAND)], [low * (1 + BAND), high * (1 + BAND)],
        color="#bfc9ca", alpha=0.5, linewidth=0, zorder=0, label=f"within {BAND:.0%} of measured",
    )  # fmt: skip
