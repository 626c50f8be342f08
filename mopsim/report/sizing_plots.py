"""Figures of a sizing: cost against days with the Pareto front, and the tornado of what-ifs."""

from collections.abc import Sequence
from pathlib import Path

from mopsim.common.units import format_number
from mopsim.report.style import SERIES, figure, legend_below
from mopsim.size.figures import DAY, LEVEL, Figures, Goal
from mopsim.size.points import Point
from mopsim.size.whatif import Swing

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One a machine, so that no colour is needed to tell them apart."""
GOOD, BAD, EDGE = "#1b4f72", "#ca6f1e", "#c0392b"


def cost_time(
    path: Path, points: Sequence[Point], front: Sequence[Point], chosen: Point | None, goal: Goal,
    level: float = LEVEL,
) -> None:  # fmt: skip
    """Cost over days of every cluster tried, an interval of days each, of probability `level`; the front as a
    line."""
    names = list(dict.fromkeys(point.hardware.name for point in points))
    scale, unit = dollars([bill.cost or 0.0 for bill in _priced(points)])
    with figure(path, 9, 5.0) as (axis,):
        for place, name in enumerate(names):
            bills = _priced([one for one in points if one.hardware.name == name])
            days, costs = _days_costs(bills, scale)
            ends = [bill.seconds_interval(level) for bill in bills]
            below = [max(0.0, day - low / DAY) for day, (low, _) in zip(days, ends, strict=True)]
            above = [max(0.0, high / DAY - day) for day, (_, high) in zip(days, ends, strict=True)]
            axis.errorbar(
                days, costs, xerr=[below, above], fmt=MARKS[place % len(MARKS)], alpha=0.75, elinewidth=0.8,
                color=SERIES[place % len(SERIES)], label=name,
            )  # fmt: skip
        axis.plot(*_days_costs(_priced(front), scale), color="#515a5a", linewidth=1.2, label="Pareto front")
        if chosen:
            axis.scatter(
                *_days_costs(_priced([chosen]), scale), s=230, facecolors="none", edgecolors=EDGE,
                linewidths=2, label="recommended",
            )  # fmt: skip
        if goal.seconds:
            axis.axvline(goal.seconds / DAY, color=EDGE, linestyle="--", label="deadline")
        if goal.budget:
            axis.axhline(goal.budget / scale, color=EDGE, linestyle=":", label="budget")
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "")
            side.set_tick_params(which="both", labelsize=9)
        axis.set_xlabel(f"days (bars: {100 * level:g} % interval)")
        axis.set_ylabel(f"cost, {unit}")
        axis.grid(alpha=0.3)
        legend_below(axis, 4)


def _priced(points: Sequence[Point]) -> list[Figures]:
    return [one.figures for one in points if one.figures and one.figures.cost]


def _days_costs(bills: Sequence[Figures], scale: float) -> tuple[list[float], list[float]]:
    return [bill.days for bill in bills], [(bill.cost or 0.0) / scale for bill in bills]


def dollars(costs: Sequence[float]) -> tuple[float, str]:
    """(dollars of a unit, its name) in which the largest of `costs` is 1 or more."""
    most = max(costs, default=0.0)
    names = ((1e6, "million USD"), (1e3, "thousand USD"))
    return next(((scale, name) for scale, name in names if most >= scale), (1.0, "USD"))


MOST = 14
"""Inputs that a tornado shows."""


def tornado(path: Path, swings: Sequence[Swing], point: Point) -> None:
    """What each input does to the cost and to the days, alone, at its low and its high value."""
    _, bill = point.step_and_bill
    shown = list(swings[:MOST])[::-1]
    panels = [("days", bill.days, "days", 1.0)]
    if bill.cost is not None:
        scale, unit = dollars([bill.cost])
        panels.insert(0, ("cost", bill.cost / scale, f"cost, {unit}", scale))
    with figure(path, 10, 1.6 + 0.34 * len(shown), 1, len(panels), sharey=True) as axes:
        for axis, (name, middle, label, scale) in zip(axes, panels, strict=True):
            for row, swing in enumerate(shown):
                for end, tint in ((swing.low, GOOD), (swing.high, BAD)):
                    value = getattr(end, name) / scale
                    axis.barh(row, value - middle, left=middle, color=tint, height=0.66)
                    side = "left" if value >= middle else "right"
                    if abs(value / middle - 1) > 0.002:
                        axis.annotate(
                            format_number(end.value), (value, row), (3 if side == "left" else -3, 0), ha=side,
                            textcoords="offset points", va="center", fontsize=7.5, color="#212f3c",
                            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6},
                        )  # fmt: skip
            axis.axvline(middle, color="#212f3c", linewidth=1)
            axis.margins(x=0.18)
            axis.set_xlabel(label)
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(shown)), [_label(one) for one in shown], fontsize=9)
        axes[0].set_title(
            "blue: the input's low value, orange: its high one", fontsize=10, fontweight="normal"
        )


def _label(swing: Swing) -> str:
    name = swing.name.replace("_", " ")
    return name if swing.unit in ("1", name) else f"{name}, {swing.unit}"
