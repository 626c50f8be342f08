"""Figures of a comparison: bars of memory and time per strategy, sweeps, losses, predicted against
measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mopsim.common.units import format_bytes
from mopsim.report.lanes import named
from mopsim.report.palette import SERIES, colour, in_order
from mopsim.report.style import byte_scale, figure, legend_below, text_on, time_scale


@dataclass(frozen=True)
class Bar:
    """One strategy's bar: parts (name -> bytes or seconds) and a remark written at its end. interval: where a
    measured total lies, with the probability `level`."""

    label: str
    parts: Mapping[str, float]
    remark: str = ""
    bad: bool = False
    interval: tuple[float, float] | None = None
    level: float | None = None

    @property
    def end(self) -> float:
        """What of the bar is furthest to the right."""
        return max(sum(self.parts.values()), self.interval[1] if self.interval else 0.0)


ROW = 0.74
"""Inches of a bar with its remark."""


def memory_bars(path: Path, bars: Sequence[Bar], limit: float | None, title: str) -> None:
    """Peak memory by category, stacked, one bar per strategy, with the device's limit as a line."""
    most = max([*(bar.end for bar in bars), limit or 0])
    unit, scale = byte_scale(most)
    with figure(path, 10, 1.9 + ROW * len(bars)) as (axis,):
        _stack(axis, bars, "memory", scale, most / scale)
        if limit:
            label = f"limit {format_bytes(limit)}"
            axis.axvline(limit / scale, color="#c0392b", linewidth=2, linestyle="--", label=label)
        axis.set_xlabel(f"device memory at the peak, {unit} per rank")
        axis.set_title(title)
        legend_below(axis)


def time_bars(path: Path, bars: Sequence[Bar], waits: Sequence[Bar], titles: tuple[str, str]) -> None:
    """Above: the step by component, stacked. Below, on its own scale: what of it is exposed, by what compute
    waits for."""
    largest, exposed = (max(bar.end for bar in chosen) for chosen in (bars, waits))
    with figure(path, 10, 3.8 + 2 * ROW * len(bars), 2) as (above, below):
        unit, scale = time_scale(largest)
        _stack(above, bars, "components", scale, largest / scale)
        above.set_xlabel(f"simulated step by component, and waiting, {unit}")
        unit, scale = time_scale(exposed)
        _stack(below, waits, "waits", scale, exposed / scale)
        below.set_xlabel(
            f"exposed: compute waits for communication, copies, the host or other stages, {unit}"
        )
        for axis, title in ((above, titles[0]), (below, titles[1])):
            axis.set_title(title)
            legend_below(axis)


SEEN = 0.002
"""Share of an axis from which a part is wide enough to be seen, and has its place in the legend."""
WHISKER: Any = {"ecolor": "#212f3c", "elinewidth": 1.4, "capsize": 5}
THICK = 0.54
"""Of a bar, where its row is 1: above it is its remark."""


def _stack(axis: Axes, bars: Sequence[Bar], space: str, scale: float, high: float) -> None:
    """Stacked horizontal bars on an axis that ends a little after `high`: a part that is wide enough has its
    number. A remark stands over its bar."""
    names = in_order(name for bar in bars for name, value in bar.parts.items() if value > 0)
    left = [0.0] * len(bars)
    most = max(sum(bar.parts.values()) for bar in bars) / scale  # without what lines reach to
    for name in names:
        widths = [bar.parts.get(name, 0.0) / scale for bar in bars]
        label = named(name, space) if max(widths) > SEEN * most else None
        drawn = axis.barh(range(len(bars)), widths, left=left, color=colour(name), label=label, height=THICK)
        numbers = [f"{width:.3g}" if width > 0.05 * max(high, 1e-12) else "" for width in widths]
        axis.bar_label(drawn, numbers, label_type="center", color=text_on(colour(name)), fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    drawn_before = False
    for row, bar in enumerate(bars):
        if bar.interval:
            low, high_end = (end / scale for end in bar.interval)
            middle = (low + high_end) / 2
            said = f"{100 * bar.level:g} % interval" if bar.level and not drawn_before else None
            drawn_before = True
            axis.errorbar(
                middle, row + 0.19, xerr=middle - low, label=said, color=WHISKER["ecolor"], **WHISKER
            )
        tint = "#c0392b" if bar.bad else "#212f3c"
        axis.text(0, row - THICK / 2 - 0.04, f" {bar.remark}", va="bottom", fontsize=10, color=tint)
    axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axis.set_ylim(len(bars) - 0.6, -0.66)
    axis.set_xlim(0, 1.02 * high or 1.0)


def loss_lines(path: Path, losses: Mapping[str, Sequence[float]], title: str) -> None:
    """Training loss per step; strategies that agree lie over each other: a wide line, a dashed one, then
    marks."""
    styles: tuple[dict[str, Any], ...] = (
        {"linestyle": "-", "linewidth": 4, "alpha": 0.6},
        {"linestyle": "--", "linewidth": 1.8},
        {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markersize": 8},
        {"linestyle": "none", "marker": "x"},
    )
    with figure(path, 10, 4.6) as (axis,):
        for index, (label, values) in enumerate(losses.items()):
            last = sum(values[-5:]) / len(values[-5:])
            axis.plot(
                range(1, len(values) + 1),
                list(values),
                **styles[index % 4],
                color=SERIES[index % len(SERIES)],
                label=f"{label}: {values[0]:.2f} to {last:.2f} ({last / values[0] - 1:+.0%})",
            )
        axis.set_xlabel("step")
        axis.set_ylabel("loss, nats per token")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right")


@dataclass(frozen=True)
class Compared:
    """A measured number with its spread, and what was predicted before calibration and after the pilot runs
    (None: not made)."""

    label: str
    measured: float
    low: float
    high: float
    before: float | None
    after: float | None


def predicted_bars(path: Path, rows: Sequence[Compared], title: str) -> None:
    """Step time per strategy: predicted before calibration, measured (with its p10-p90 spread), predicted
    after the pilot runs."""
    values = [value for row in rows for value in (row.high, row.before or 0, row.after or 0)]
    unit, scale = time_scale(max(values))
    shown = {
        "before": ("#bfc9ca", "predicted before calibration"),
        "measured": ("#1b4f72", "measured (line: p10 to p90)"),
        "after": ("#ca6f1e", "predicted after the pilot runs"),
    }
    width = 0.26
    with figure(path, 10, 5) as (axis,):
        for place, (name, (tint, label)) in enumerate(shown.items(), -1):
            heights = [(getattr(row, name) or 0) / scale for row in rows]
            errors = [height * scale / row.measured - 1 for row, height in zip(rows, heights, strict=True)]
            texts, spread = [f"{error:+.0%}" for error in errors], None
            if name == "measured":
                texts = [f"{height:.3g}" for height in heights]
                ends = [(row.measured - row.low, row.high - row.measured) for row in rows]
                spread = [[end / scale for end in each] for each in zip(*ends, strict=True)]
            spots = [index + place * width for index in range(len(rows))]
            bars = axis.bar(
                spots, heights, width * 0.94, color=tint, label=label, yerr=spread, error_kw=WHISKER
            )
            axis.bar_label(bars, texts, padding=4, fontsize=10)
        axis.set_xticks(range(len(rows)), [row.label for row in rows])
        axis.set_ylim(0, max(values) / scale * 1.15)
        axis.set_ylabel(f"step time, {unit}")
        axis.set_title(title)
        legend_below(axis, 3)


def remark(over: str | None, over_bytes: float) -> str:
    """What to write at the end of the bar of a strategy that does not fit."""
    return f"does not fit: {over or 'memory'}, {format_bytes(over_bytes)} over"
