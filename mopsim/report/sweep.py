"""Strategies over the values of one setting: words, tables and a figure."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar

from matplotlib.transforms import ScaledTranslation
from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_probability
from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE
from mopsim.report.findings import Results, doubts, odds, outcome, unsure
from mopsim.report.page import Table
from mopsim.report.palette import SERIES
from mopsim.report.style import figure, legend_below
from mopsim.report.tables import NO_STRATEGY, beside, columns, plan_line, rate, row
from mopsim.report.terminal import duration, size, table

T = TypeVar("T")
NO_MEMORY = "does not fit in memory"
MAY_NOT = f"may not fit: P(fits) below {SURE:g}"
"""What a hollow point says."""
MARKS = {NO_MEMORY: "x", NO_STRATEGY: "+"}
"""Why a strategy has no throughput, and the mark of that."""
HOLLOW: dict[str, Any] = {
    "marker": "o", "markerfacecolor": "white", "markeredgewidth": 2, "linestyle": "none", "zorder": 4,
}  # fmt: skip
MARGIN = 0.08
"""Of the axis beside its first and last value, where the marks of some strategies lie side by side."""
TITLE = 84
"""Characters of a line of a figure's title."""


@dataclass(frozen=True)
class SweepPoint:
    """One value of a setting. name: as it was written. results: by label; refused: why one has none. batch,
    length: sequences of a step, tokens of a sequence. devices: of the machines; a plan may use fewer. held:
    sequences of a step by what is constant; 0: the batch."""

    value: int
    name: str
    results: Results
    refused: Mapping[str, str] = field(default_factory=dict)
    batch: int = 0
    length: int = 0
    devices: int = 0
    held: float = 0.0

    @property
    def off(self) -> str:
        """'+12.5 %': how far tokens per step are from what is held, as the batch must divide over data
        groups."""
        off = f"{100 * (self.batch / (self.held or self.batch or 1) - 1):+.1f} %"
        return off if self.held and float(off[:-2]) else ""

    def used(self, label: str) -> str:
        """'16 of 64': devices that a plan uses, where it is not all."""
        one = self.results[label]
        ranks = one.strategy.world_size if one else self.devices
        return f"{ranks:,} of {self.devices:,}" if ranks < self.devices else ""


@dataclass(frozen=True)
class Sweep:
    """Strategies over the values of one setting, ascending. hold: what is constant."""

    setting: str
    points: Sequence[SweepPoint]
    hold: str = ""

    @property
    def values(self) -> list[int]:
        return [point.value for point in self.points]

    @property
    def labels(self) -> list[str]:
        return list(self.points[0].results)

    @property
    def every(self) -> list[SimResult]:
        return [one for point in self.points for one in point.results.values() if one]

    def by_label(self, what: Callable[[SimResult | None], T]) -> dict[str, list[T]]:
        """Something of each value's result."""
        return {label: [what(point.results[label]) for point in self.points] for label in self.labels}

    def rates(self) -> dict[str, list[float]]:
        """Tokens/s of a device; NaN where a strategy does not fit, or is not legal."""
        return self.by_label(lambda one: one.tokens_per_second_per_device if one and one.fits else nan)

    @property
    def each(self) -> list[str]:
        """What the devices of the results are called."""
        return [one.each for one in self.every]

    @property
    def part(self) -> str:
        """'meg uses 16 of 32 devices at 2, 16 of 64 devices at 4: numbers per GPU are of these'; empty where
        all use all."""
        users: dict[str, list[str]] = {}
        for label in self.labels:
            some = [(point.used(label), point.name) for point in self.points]
            if found := ", ".join(f"{used} devices at {name}" for used, name in some if used):
                users.setdefault(found, []).append(label)
        said = [f"{' and '.join(all_)} use{'s' * (len(all_) == 1)} {found}" for found, all_ in users.items()]
        return (
            f"{'; '.join(said)}: numbers per {' or '.join(dict.fromkeys(self.each))} are of these"
            if said
            else ""
        )

    @property
    def held(self) -> str:
        """'held constant: tokens per step (1,048,576)', and where that is not exact."""
        if not self.hold:
            return ""
        tokens = [point.batch * point.length for point in self.points]
        if self.hold != "tokens per step":
            return f"held constant: {self.hold}; tokens per step {min(tokens):,} to {max(tokens):,}"
        held = {round(point.held * point.length) for point in self.points if point.held}
        usual = held.pop() if len(held) == 1 else max(tokens, key=tokens.count)
        other = [
            f"{point.name} has {count:,}{f' ({point.off})' if point.off else ''}"
            for point, count in zip(self.points, tokens, strict=True)
            if count != usual
        ]
        return "; ".join([f"held constant: tokens per step ({usual:,})", *other])


def over(sweep: Sweep) -> str:
    """'Over nodes: a is fastest at 1 (probability 0.53), 2 (probability 0.8); a and b tie at 4, 8 (b may not
    fit: P 0.75)'."""
    places: dict[str, list[str]] = {}
    for point in sweep.points:
        places.setdefault(outcome(point.results), []).append(f"{point.name}{_aside(point.results)}")
    found = [f"{said} at {', '.join(names)}" for said, names in places.items()]
    return "; ".join(filter(None, (f"Over {sweep.setting}: {'; '.join(found)}", sweep.part)))


def _aside(results: Results) -> str:
    """' (probability 0.53; b may not fit: P 0.75)': how surely the outcome holds."""
    said = "; ".join(filter(None, (odds(results), doubts(results))))
    return f" ({said})" if said else ""


def _title(sweep: Sweep) -> str:
    """How far the strategies go, and who is fastest at the last value that all reach."""
    unit = {"seq-len": "tokens"}.get(sweep.setting, sweep.setting)
    reached = [point for point in sweep.points if any(one and one.fits for one in point.results.values())]
    if not reached:
        return f"Nothing {'fits' if sweep.every else 'is legal'} anywhere in the sweep"
    last, name = reached[-1].results, reached[-1].name
    leaders = [label for label, one in last.items() if one and one.fits]
    if len(leaders) < len(last):
        return f"{', '.join(leaders)} reach{'es' * (len(leaders) == 1)} {name} {unit}{_aside(last)}"
    whole = [point.name for point in reached if all(one and one.fits for one in point.results.values())]
    holes = len(whole) < sweep.points.index(reached[-1]) + 1
    first = f"; {outcome(last)} {f'at {name}' if holes else 'there'}" if len(last) > 1 else ""
    where = f"at {', '.join(whole)}" if holes else f"up to {name}"
    return f"All fit {where} {unit}{first}{_aside(last)}"


def _lost(result: SimResult | None) -> str:
    """Why there is no throughput."""
    return NO_STRATEGY if result is None else "" if result.fits else NO_MEMORY


def _band(result: SimResult | None, level: float) -> tuple[float, float]:
    """Tokens/s of a device at the ends of the step time's interval, where it fits."""
    if not result or not result.fits:
        return nan, nan
    fast, slow = result.step_time_interval(level)
    tokens = result.tokens_per_second_per_device * result.step_time
    return tokens / slow, tokens / fast


def sweep_figure(path: Path, sweep: Sweep, level: float = 0.9, where: str = "") -> None:
    """Throughput over the setting; where there is none the line ends, and a mark on the axis says why; a
    hollow point may not fit. level: of the bands. where: the network and the machine, for the title, which
    says too what is held constant, and how many devices plans use that do not use all."""
    below = "; ".join(filter(None, (where, sweep.held, sweep.part)))
    lost = sweep.by_label(_lost)
    marks = {why: mark for why, mark in MARKS.items() if any(why in found for found in lost.values())}
    with figure(path, 10, 5.2) as (axis,):
        for index, (label, heights) in enumerate(sweep.rates().items()):
            tint = SERIES[index % len(SERIES)]
            axis.plot(sweep.values, heights, marker="o", color=tint, linewidth=2, label=label)
            hollow = [one and unsure(one) for one in (point.results[label] for point in sweep.points)]
            rims = [nan if not bare else y for y, bare in zip(heights, hollow, strict=True)]
            if any(hollow):
                axis.plot(sweep.values, rims, color=tint, **HOLLOW)
            low, high = zip(*(_band(point.results[label], level) for point in sweep.points), strict=True)
            axis.fill_between(sweep.values, low, high, color=tint, alpha=0.18, linewidth=0)
            for why, mark in marks.items():
                at = [x for x, one in zip(sweep.values, lost[label], strict=True) if one == why]
                if not at:  # points that are not clipped, and are none, have an infinite extent
                    continue
                aside = ScaledTranslation(0.12 * index, 0, axis.figure.dpi_scale_trans)
                axis.scatter(
                    at, [0] * len(at), marker=mark, s=70, linewidth=2.5, color=tint, zorder=5, clip_on=False,
                    transform=axis.get_xaxis_transform() + aside,
                )  # fmt: skip
        if sweep.every:
            axis.fill_between(
                [], [], [], color="#515a5a", alpha=0.18, linewidth=0, label=f"{level:.0%} interval"
            )
        if any(map(unsure, sweep.every)):
            axis.plot([], [], color="#515a5a", label=MAY_NOT, **HOLLOW)
        for why, mark in marks.items():
            axis.scatter([], [], marker=mark, color="#515a5a", label=why)
        axis.set_xscale("log", base=2)
        axis.margins(x=MARGIN)
        axis.set_xticks(sweep.values, [point.name for point in sweep.points])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel({"seq-len": "sequence length, tokens"}.get(sweep.setting, sweep.setting))
        axis.set_ylabel(rate(sweep.each))
        axis.set_title("\n".join(filter(None, (*wrap(_title(sweep), TITLE), *wrap(below, TITLE)))))
        axis.grid(axis="y", alpha=0.3)
        legend_below(axis, 5)


def swept_table(sweep: Sweep, level: float = 0.9, said: Collection[str] = ()) -> Group:
    """Every point on the terminal: its numbers, and under them each plan and each refusal once.
    level: of the intervals. said: refusals that were told before."""
    per = rate(sweep.each).replace(" per", "\nper")
    shown = table(
        f"over {sweep.setting}; {sweep.held}", (sweep.setting, "strategy"),
        ("batch", "step", f"{level:.0%}", per, "exposed", "memory", "P(fits)"),
    )  # fmt: skip
    shown.padding = 0  # seven numbers in 80 columns
    plans: dict[tuple[str, str], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for point in sweep.points:
        name, batch = point.name, "\n".join(filter(None, (f"{point.batch:,}", point.off)))
        for label, result in point.results.items():
            if result is None:
                shown.add_row(name, label, batch, *["-"] * 6, style="red")
                refused.setdefault(point.refused.get(label) or NO_STRATEGY, []).append(f"{name} {label}")
                continue
            step = duration(result.step_time)
            shown.add_row(
                name, label, batch, step, beside(result.step_time_interval(level), step),
                f"{result.tokens_per_second_per_device:,.0f}", f"{result.exposed_share:.0%}",
                size(result.peak_memory), format_probability(result.p_fits) if result.fits else "out",
                style="" if result.fits else "red",
            )  # fmt: skip
            used = point.used(label)
            who = f"{label}{f', {used} devices' if used else ''}"
            plans.setdefault((who, plan_line(result)), []).append(name)
    lines = [f"{', '.join(names)} {who}: {line}" for (who, line), names in plans.items()]
    lines += [f"{', '.join(them)}: {why}" for why, them in refused.items() if why not in said]
    return Group(shown, *map(Text, lines))


def swept_rows(sweep: Sweep, level: float = 0.9) -> Table:
    """A row for each value and strategy, its plan among them."""
    numbers = columns(level, sweep.each)
    heads = [sweep.setting, "batch", "label", *numbers]
    rows = []
    for point in sweep.points:
        batch = f"{point.batch:,}{f' ({point.off})' if point.off else ''}"
        for label, result in point.results.items():
            why = f": {point.refused[label]}" if label in point.refused else ""
            none = [f"{NO_STRATEGY}{why}", *[""] * (len(numbers) - 1)]
            used = point.used(label)
            named = f"{label} ({used} devices)" if used else label
            rows.append([point.name, batch, named, *(row(result, level) if result else none)])
    return Table(heads, rows)
