"""Figures of a sizing: cost against days with the Pareto front, and the tornado of what-ifs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from mopsim.common.units import format_nodes, format_number
from mopsim.report.palette import SERIES
from mopsim.report.style import figure, legend_below
from mopsim.size.figures import DAY, LEVEL, Figures, Goal
from mopsim.size.points import Point
from mopsim.size.whatif import Swing
from mopsim.spec.categories import WAITS

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


LEAST = 0.01
"""Of the widest bar of a tornado: an input whose bars are shorter is left out."""
NAMES = {
    "failure_rate": "interruptions of the job", "hardware_share": "interruptions that need a repair",
    "rent_spread": "price at another provider", "draw_share": "power drawn in training",
    "node_over_devices": "rated power of a node", "pue": "power of the building",
    "usage": "use of the cluster over its life", "residual": "value at the end", "carbon": "CO2 of the grid",
    "support_share": "support and spare parts", "nodes": "size of the cluster",
    "global_batch_tokens": "tokens of a step",
}  # fmt: skip
"""Inputs whose field is not the plainest name."""
KINDS = {
    **WAITS, "matmul": "matrix products", "grouped_matmul": "experts' products",
    "memory_bound": "kernels bound by memory", "optimizer": "the optimizer's update",
}  # fmt: skip
"""Of work whose speed is an input."""
UNITS_OF = {
    "x": ((1.0, "times the profile's seconds"),),
    "s": ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")),
    "tokens": ((1e6, "million"), (1e3, "thousand"), (1.0, "")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s"), (1.0, "B/s")),
    "1/h": ((1e-3, "in 1,000 device-hours"), (1e-6, "in a million device-hours")),
    "W": ((1e3, "kW"), (1.0, "W")),
    "1": ((1.0, ""),),
}
"""By a swing's unit the ones that it is shown in, largest first; others are shown as they are."""


def shown_in(swing: Swing) -> tuple[float, str]:
    """(how much one of it is in the swing's unit, its name): the largest of which the low end has one."""
    units = UNITS_OF.get(swing.unit, ((1.0, swing.unit),))
    ends = [end.value for end in (swing.low, swing.high) if end.value > 0]
    return next((one for one in units if one[0] <= min(ends, default=0.0)), units[-1])


def tornado(path: Path, swings: Sequence[Swing], point: Point, model: str) -> None:
    """What each input does to the cost and to the days, alone, at its low and its high value."""
    _, bill = point.step_and_bill
    widest = max((one.share(bill) for one in swings), default=0.0)
    shown = [one for one in swings if one.share(bill) > LEAST * widest][:MOST][::-1]
    panels = [("days", bill.days, "days", 1.0)]
    if bill.cost is not None:
        scale, unit = dollars([bill.cost])
        panels.insert(0, ("cost", bill.cost / scale, f"cost, {unit}", scale))
    where = f"{format_nodes(point.num_nodes)} of {point.hardware.name}"
    with figure(path, 10, 1.9 + 0.34 * len(shown), 1, len(panels), sharey=True) as axes:
        for axis, (name, middle, label, scale) in zip(axes, panels, strict=True):
            for row, swing in enumerate(shown):
                _swing(axis, row, swing, name, middle, scale)
            axis.axvline(middle, color="#212f3c", linewidth=1)
            axis.margins(x=0.18)
            axis.set_xlabel(label)
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(shown)), [label_of(one) for one in shown], fontsize=9)
        axes[0].figure.suptitle(
            f"What each input alone changes: {model} on {where}\n"
            "blue: at the input's low value, orange: at its high one", fontsize=11, x=0.01, ha="left",
        )  # fmt: skip


def _swing(axis: Axes, row: int, swing: Swing, name: str, middle: float, scale: float) -> None:
    size, _ = shown_in(swing)
    ends = [(getattr(one, name) / scale, one, tint) for one, tint in ((swing.low, GOOD), (swing.high, BAD))]
    ends.sort(key=lambda end: -abs(end[0] - middle))  # the shorter bar over the longer one
    for index, (value, end, tint) in enumerate(ends):
        axis.barh(row, value - middle, left=middle, color=tint, height=0.66)
        inside = index == 1 and (value - middle) * (ends[0][0] - middle) > 0
        right = (value >= middle) != inside  # where its end is in the other bar: beyond the middle
        if abs(value / middle - 1) > 0.002:
            axis.annotate(
                format_number(end.value / size), (middle if inside else value, row),
                (3 if right else -3, 0), ha="left" if right else "right",
                textcoords="offset points", va="center", fontsize=7.5, color="#212f3c",
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6},
            )  # fmt: skip


def label_of(swing: Swing) -> str:
    """'repair time, hours', 'matrix products, times the profile's seconds'."""
    name = NAMES.get(swing.name) or KINDS.get(swing.name) or swing.name.replace("_", " ")
    _, unit = shown_in(swing)
    return f"{name}, {unit}" if unit else name
