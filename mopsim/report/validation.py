"""Figures of a validation: predicted against measured by source, GPU and family; components."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from mopsim.common.units import UNITS
from mopsim.report.style import SERIES, figure
from mopsim.validate.components import Predicted
from mopsim.validate.output import GROUPS, MEASURES, selections
from mopsim.validate.run import Validation
from mopsim.validate.scoring import by_group, over_sources

Points = list[tuple[float, float]]
BAND = 0.1
"""Relative error that the grey band shows."""


def figures(folder: Path, validation: Validation, parts: Sequence[Predicted]) -> list[Path]:
    """Write the figures that there are points for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for group in ("source", "gpu", "family"):
        times: dict[str, Points] = defaultdict(list)
        memory: dict[str, Points] = defaultdict(list)
        for one in validation.scored:
            name = GROUPS[group](one)
            if one.case.step_time:
                times[name].append((one.case.step_time, one.calibrated))
            if one.case.peak_memory:
                memory[name].append((one.case.peak_memory / UNITS["GiB"], one.peak_memory / UNITS["GiB"]))
        if times:
            path = folder / f"step_time_by_{group}.png"
            written.append(
                _scatter(path, times, "seconds of a step", finding(validation, "step_time_s", group, times))
            )
        if memory:
            path = folder / f"peak_memory_by_{group}.png"
            title = finding(validation, "peak_memory_bytes", group, memory)
            written.append(_scatter(path, memory, "GiB at the peak", title))
    if parts:
        written += _components(folder, parts)
    return written


JUDGED = {
    "step_time_s": ("Step time", "bf16_fp16_AB", "bf16 and fp16, grades A and B, held out"),
    "peak_memory_bytes": ("Peak memory", "AB", "grades A and B"),
}
"""Of each quantity: its name, the selection that its figure is stated for, and what that is."""
FEW = 5
"""Rows from which a group counts as the worst."""


def finding(validation: Validation, measure: str, group: str, groups: dict[str, Points]) -> str:
    """The mean error of the rows that are judged, and the worst of their groups."""
    name, selection, which = JUDGED[measure]
    rows = selections(validation.scored)[selection]
    found = over_sources(rows, MEASURES[measure])
    if found is None:
        return spread(name, groups)
    count = len(by_group(rows, MEASURES[measure], GROUPS["source"]))
    sources = f"{count} source{'s' if count > 1 else ''}"
    head = f"{name}: {found.mape:.1%} mean error over {sources}, 9 of 10 rows within {found.p90:.1%}"
    means = by_group(rows, MEASURES[measure], GROUPS[group])
    most = max(((e.mape, key) for key, e in means.items() if e.n >= FEW), default=None)
    worst = f"\nworst {group} with {FEW} rows or more: {most[1]}, {most[0]:.1%}" if most else ""
    return f"{head}{worst}\n({which})"


def spread(name: str, groups: dict[str, Points]) -> str:
    """The groups with the smallest and the largest mean error."""
    means = sorted((_mean(points), key) for key, points in groups.items())
    (least, best), (most, worst) = means[0], means[-1]
    if len(means) == 1:
        return f"{name}: {best} {least:.1%} mean error"
    return f"{name}: mean error from {least:.1%} ({best})\nto {most:.1%} ({worst})"


def _mean(points: Points) -> float:
    return fmean(abs(predicted / measured - 1) for measured, predicted in points)


def _components(folder: Path, parts: Sequence[Predicted]) -> list[Path]:
    metrics: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    for one in parts:
        if one.predicted and one.component.value:
            metrics[one.component.metric][one.component.kind].append((one.component.value, one.predicted))
    chosen = {
        "latency_s": ("Time of a component", "seconds"),
        "flops_per_s": ("Rate of a kernel", "FLOP/s"),
        "peak_memory_gib": ("Peak memory of a component", "GiB"),
    }
    return [
        _scatter(folder / f"components_{metric}.png", metrics[metric], unit, spread(name, metrics[metric]))
        for metric, (name, unit) in chosen.items()
        if metrics.get(metric)
    ]


def _scatter(path: Path, groups: dict[str, Points], unit: str, title: str) -> Path:
    """Measured on the horizontal, predicted on the vertical axis, both logarithmic; the diagonal and a
    band."""
    with figure(path, 8.5, 7) as (axis,):
        for index, (name, points) in enumerate(sorted(groups.items())):
            xs, ys = [p[0] for p in points], [max(p[1], 1e-12) for p in points]
            axis.scatter(
                xs, ys, s=22, alpha=0.7, color=SERIES[index % len(SERIES)], marker="os^Dvx+"[index //
                len(SERIES) % 7],
                label=f"{name}: {len(points)}, {_mean(points):.0%}",
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
            loc="upper left", fontsize=8, title="rows of every grade, their mean error", title_fontsize=8
        )
    return path


def _diagonal(axis: Axes, low: float, high: float) -> None:
    low, high = low / math.sqrt(2), high * math.sqrt(2)
    axis.plot([low, high], [low, high], color="#515a5a", linewidth=1)
    band: Callable[[float], list[float]] = lambda share: [low * share, high * share]  # noqa: E731
    axis.fill_between(
        [low, high], band(1 - BAND), band(1 + BAND), color="#bfc9ca", alpha=0.5, linewidth=0, zorder=0,
        label=f"within {BAND:.0%} of measured",
    )  # fmt: skip
