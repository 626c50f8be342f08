"""Figures of a sizing: cost against days with the Pareto front, and the tornado of what-ifs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from mopsim.common.units import format_nodes, format_number
from mopsim.report.palette import SERIES
from mopsim.report.sizing import title
from mopsim.report.style import figure, legend_below
from mopsim.size.decided import Decided
from mopsim.size.figures import DAY, Figures
from mopsim.size.points import Point
from mopsim.size.whatif import Swing
from mopsim.spec.categories import WAITS

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One a machine, so that no colour is needed to tell them apart."""
GOOD, BAD, EDGE = "#1b4f72", "#ca6f1e", "#c0392b"
APART = (30.0, 16.0)
"""Pixels from one number of nodes to the next, across and up, so that both can be read."""
AROUND = 1.4
"""How many times the recommended cluster's cost a cluster may cost to be in the second panel."""


def cost_time(path: Path, d: Decided) -> None:
    """Cost over days of every cluster that fits, an interval of days each; the front as a line; the best of
    each other machine type is marked as the recommended one is. Where others cost about as much as that, a
    second panel has them alone, with their nodes."""
    points, front, chosen, request = d.points, d.front, d.chosen, d.request
    goal, level, rivals = request.goal, request.interval, [one.best for one in d.sizings if one.best]
    bill = chosen.figures if chosen else None
    least = bill.cost if bill and bill.cost else 0.0
    near = [one for one in _with_price(points) if (one.figures.cost or 0.0) <= AROUND * least]  # type: ignore[union-attr]
    panels = [points, near] if 2 < len(near) < len(_with_price(points)) else [points]
    names = list(dict.fromkeys(point.hardware.name for point in points))
    with figure(path, 9 if len(panels) == 1 else 13, 5.4, 1, len(panels)) as axes:
        for axis, shown in zip(axes, panels, strict=True):
            costs = [bill.cost or 0.0 for bill in _priced(shown)]
            scale, unit = dollars(costs)
            for place, name in enumerate(names):
                _machine(axis, [one for one in shown if one.hardware.name == name], name, place, scale, level)
            line = [one for one in front if one in shown]
            axis.plot(
                *_days_costs(_priced(line), scale), color="#515a5a", linewidth=1.2, label="Pareto front"
            )
            _ring(axis, [chosen] if chosen else [], scale, "-", "recommended")
            others = [one for one in rivals if one is not chosen and one in shown]
            _ring(axis, others, scale, ":", "best of another machine type")
            if goal.seconds:
                axis.axvline(goal.seconds / DAY, color=EDGE, linestyle="--", label="deadline")
            if goal.budget and (goal.budget <= AROUND * max(costs, default=0.0) or axis is axes[0]):
                axis.axhline(goal.budget / scale, color=EDGE, linestyle=":", label="budget")
            _scales(axis, [one / scale for one in costs])
            axis.set_xlabel(f"days (bars: {100 * level:g} % interval; numbers: nodes)")
            axis.set_ylabel(f"cost, {unit}")
            first = [one for one in (chosen, *others) if one in shown and one]
            _nodes(axis, [*first, *line, *shown], scale)
        axes[0].set_title(title(request).partition(" within")[0], fontsize=11)
        if len(panels) > 1:
            axes[1].set_title(f"At most {AROUND:g} times the recommended cost", fontsize=11)
        legend_below(axes[0], 3)


def _machine(axis: Axes, points: Sequence[Point], name: str, place: int, scale: float, level: float) -> None:
    """The clusters of a machine type, an interval of days each."""
    bills = _priced(points)
    days, costs = _days_costs(bills, scale)
    ends = [bill.seconds_interval(level) for bill in bills]
    below = [max(0.0, day - low / DAY) for day, (low, _) in zip(days, ends, strict=True)]
    above = [max(0.0, high / DAY - day) for day, (_, high) in zip(days, ends, strict=True)]
    axis.errorbar(
        days, costs, xerr=[below, above], fmt=MARKS[place % len(MARKS)], alpha=0.75, elinewidth=0.6,
        color=SERIES[place % len(SERIES)], label=name,
    )  # fmt: skip


def _ring(axis: Axes, points: Sequence[Point], scale: float, style: str, label: str) -> None:
    if points:
        axis.scatter(
            *_days_costs(_priced(points), scale), s=230, facecolors="none", edgecolors=EDGE, linewidths=2,
            linestyle=style, label=label, zorder=4,
        )  # fmt: skip


def _nodes(axis: Axes, points: Sequence[Point], scale: float) -> None:
    """The number of nodes beside clusters, of those that lie close together beside the first alone."""
    placed: list[tuple[float, float]] = []
    for point in points:
        for day, cost in zip(*_days_costs(_priced([point]), scale), strict=True):
            x, y = axis.transData.transform((day, cost))
            if any(abs(x - left) < APART[0] and abs(y - low) < APART[1] for left, low in placed):
                continue
            placed.append((x, y))
            axis.annotate(
                f"{point.num_nodes:,}", (day, cost), (8, 6), textcoords="offset points", ha="left",
                fontsize=8, color="#212f3c",
            )  # fmt: skip


def _scales(axis: Axes, costs: Sequence[float]) -> None:
    """Both axes by ratio, the cost's to a little beyond the clusters, with marks within a decade."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    if costs:
        pad = max(1.04, (max(costs) / min(costs)) ** 0.06)
        axis.set_ylim(min(costs) / pad, max(costs) * pad)
    for side, wide in ((axis.xaxis, False), (axis.yaxis, bool(costs) and max(costs) > 5 * min(costs))):
        side.set_major_formatter("{x:g}")
        if side is axis.yaxis and costs and not wide:
            side.set_major_locator(MaxNLocator(6))
            side.set_minor_locator(NullLocator())
        side.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "")
        side.set_tick_params(which="both", labelsize=9)
    axis.grid(which="both", alpha=0.25)


def _with_price(points: Sequence[Point]) -> list[Point]:
    return [one for one in points if one.figures and one.figures.cost]


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
