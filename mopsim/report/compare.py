"""The comparison of strategies as a report: tables and figures that say which is fastest and what stops
the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_bytes, format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.intervals import Ratio
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.plots import Bar, memory_bars, remark, sweep_lines, time_bars
from mopsim.report.tables import P_FITS, beside, columns, plan_line, rate, row
from mopsim.report.terminal import duration, size, table
from mopsim.report.timeline import timeline_plot
from mopsim.search.result import exhausted, format_gap


@dataclass(frozen=True)
class Sweep:
    """Strategies over the values of one setting (names: as they were written), by label; None where there is
    no result.

    bands: tokens/s of a GPU at the ends of an interval, where there is one. refused: why there is no result.
    batches, lengths: sequences of a step, tokens of a sequence, at each value. hold: what is constant.
    """

    setting: str
    values: Sequence[int]
    names: Sequence[str]
    results: Mapping[str, Sequence[SimResult | None]]
    bands: Mapping[str, Sequence[tuple[float, float] | None]] = field(default_factory=dict)
    refused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    batches: Sequence[int] = ()
    lengths: Sequence[int] = ()
    hold: str = ""

    @property
    def each(self) -> list[str]:
        """What the devices of the results are called."""
        return [one.each for points in self.results.values() for one in points if one]

    @property
    def held(self) -> str:
        """'held constant: tokens per step (1,048,576)', and where that is not exact."""
        if not self.hold:
            return ""
        tokens = [batch * length for batch, length in zip(self.batches, self.lengths, strict=True)]
        if self.hold != "tokens per step":
            return f"held constant: {self.hold}; tokens per step {min(tokens):,} to {max(tokens):,}"
        usual = max(set(tokens), key=tokens.count)
        other = [
            f"{name} has {count:,}" for name, count in zip(self.names, tokens, strict=True) if count != usual
        ]
        return "; ".join([f"held constant: tokens per step ({usual:,})", *other])


TITLE = 84
"""Characters of a line of a figure's title."""
Gaps = Mapping[str, float | None]
"""Of strategies that a search found, by label: SearchResult.gap."""


def finding(
    results: Sequence[SimResult], labels: Sequence[str], gaps: Gaps | None = None, level: float = 0.9
) -> str:
    """One sentence: the winner, by how much and how surely, or that nothing fits; and whose search was not
    exhausted. level: of the ratio's interval."""
    found = _winner(results, labels) + _how_surely(results, labels, level)
    open_gaps = {label: gap for label, gap in (gaps or {}).items() if not exhausted(gap)}
    faster = ", ".join(f"{label} by at most {format_gap(gap)}" for label, gap in open_gaps.items() if gap)
    fit = ", ".join(label for label, gap in open_gaps.items() if gap is None)
    parts = (faster and f"plans left out may be faster, {faster}", fit and f"plans left out may fit, {fit}")
    left = "; ".join(part for part in parts if part)
    return f"{found} (not exhausted: {left})" if left else found


def _fastest_first(results: Sequence[SimResult], labels: Sequence[str]) -> list[tuple[str, SimResult]]:
    """Those that fit."""
    fitting = [(label, one) for label, one in zip(labels, results, strict=True) if one.fits]
    return sorted(fitting, key=lambda one: (one[1].step_time, one[0]))


def _winner(results: Sequence[SimResult], labels: Sequence[str]) -> str:
    order = _fastest_first(results, labels)
    if not order:
        return "No strategy fits"
    if len(order) == 1:
        return f"{order[0][0]} is the only one that fits" if len(results) > 1 else f"{order[0][0]} fits"
    (best, fastest), (other, second) = order[:2]
    return f"{best} is fastest, {second.step_time / fastest.step_time:.2f}x as fast as {other}"


def lead(results: Sequence[SimResult], labels: Sequence[str]) -> tuple[str, Ratio] | None:
    """The next best's label and how many times as fast the winner is; None where fewer than two fit."""
    order = _fastest_first(results, labels)
    return (order[1][0], order[0][1].times_as_fast_as(order[1][1])) if len(order) > 1 else None


def _how_surely(results: Sequence[SimResult], labels: Sequence[str], level: float) -> str:
    """Of the winner's lead, where there is one."""
    found = lead(results, labels)
    if found is None:
        return ""
    _, ratio = found
    low, high = ratio.interval(level)
    sure = format_probability(ratio.p_faster)
    return f" ({low:.2f}x to {high:.2f}x with {level:.0%}; the faster one with probability {sure})"


def difference(results: Sequence[SimResult], labels: Sequence[str]) -> str:
    """Where the next best loses most to the fastest; of the optimizer, that it runs once a step."""
    order = _fastest_first(results, labels)
    if len(order) < 2:
        return ""
    (_, best), (name, other) = order[:2]
    parts = other.time_by_component
    more = {kind: seconds - best.time_by_component.get(kind, 0.0) for kind, seconds in parts.items()}
    kind = max(more, key=more.__getitem__)
    if more[kind] <= 0.0:
        return ""
    note = ", once a step however many its tokens: a larger batch narrows it" if kind == "optimizer" else ""
    return f"{name} loses most in {kind.replace('_', ' ')}, {format_seconds(more[kind])}{note}"


def software(results: Sequence[SimResult], labels: Sequence[str]) -> str:
    """That the winner's lead is of plan and software, where the next best runs on another stack."""
    order = _fastest_first(results, labels)[:2]
    if len(order) < 2 or order[0][1].stack == order[1][1].stack:
        return ""
    named = ", ".join(f"{label} on {one.stack.name}" for label, one in order)
    return f"The ratio is of plan and software together ({named}): --stack NAME simulates all on one"


def summary(
    results: Sequence[SimResult], labels: Sequence[str], gaps: Gaps | None = None, level: float = 0.9
) -> str:
    """The finding, whether it is of plans alone, and where the difference lies."""
    found = finding(results, labels, gaps, level), software(results, labels), difference(results, labels)
    return " ".join(f"{one}." for one in found if one)


def memory_figure(
    path: Path, results: Sequence[SimResult], labels: Sequence[str], level: float | None = None
) -> Path:
    """Memory at the peak by category, with the limit; the title says who fits. level: of an interval that is
    drawn over each bar."""
    lost = [label for result, label in zip(results, labels, strict=True) if not result.fits]
    title = f"Peak memory: {', '.join(lost)} over the limit" if lost else _least(results, labels)
    bars = [
        Bar(
            label,
            {k: float(v) for k, v in r.memory_by_category.items()},
            _memory_remark(r),
            not r.fits,
            r.peak_memory_interval(level) if level else None,
        )
        for r, label in zip(results, labels, strict=True)
    ]
    limit = min(result.memory_limit for result in results)
    near = limit < 3 * max(result.peak_memory for result in results)
    return memory_bars(path, bars, limit if near else None, title)


def _least(results: Sequence[SimResult], labels: Sequence[str]) -> str:
    peak, label = min((r.peak_memory, label) for r, label in zip(results, labels, strict=True))
    most = max(r.peak_memory for r in results)
    return (
        f"Peak memory: {label} needs the least, {peak / most:.0%} of the largest"
        if len(results) > 1
        else f"Peak memory of {label}"
    )


def _memory_remark(result: SimResult) -> str:
    if result.fits:
        share = result.peak_memory / result.memory_limit
        return f"{format_bytes(result.peak_memory)} ({share:.0%} of the limit)"
    return f"{format_bytes(result.over_bytes)} over: {result.over}"


def time_figure(
    path: Path, results: Sequence[SimResult], labels: Sequence[str], level: float | None = None,
    title: str = "",
) -> Path:  # fmt: skip
    """The step by component, and how much of it is exposed to what. level: of an interval that is drawn over
    each step. title: instead of who is fastest, as simulated."""
    bars, waits = [], []
    for result, label in zip(results, labels, strict=True):
        speed = f"{result.speed} on {result.stack.name}"
        note = speed if result.fits else remark(result.over, result.over_bytes)
        ends = result.step_time_interval(level) if level else None
        bars.append(Bar(label, _ordered(result.time_by_component), note, not result.fits, ends))
        waits.append(Bar(label, _ordered(result.exposed), f"{result.exposed_share:.0%} of the step"))
    most = max((result.exposed_share, label) for result, label in zip(results, labels, strict=True))
    titles = (
        title or f"Simulated step: {_winner(results, labels)}",
        f"Exposed: {most[1]} most, {most[0]:.0%} of its step",
    )
    return time_bars(path, bars, waits, titles)


def _ordered(values: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def timeline_title(result: SimResult, label: str) -> str:
    """What the picture shows: the step's length, what is exposed, how many microbatches and which stages."""
    drawn, total = result.drawn_microbatches, result.training.num_microbatches(result.strategy)
    part = f" ({drawn} of {total} microbatches drawn)" if drawn < total else ""
    between = result.time_by_component.get("runtime", 0.0) / result.step_time
    undrawn = f", {between:.0%} between ops (not drawn)" if between >= 0.005 else ""
    seen, full, stages = (
        result.span_stage + 1,
        result.memory_stage + 1,
        result.strategy.pipeline.pipeline_parallel,
    )
    where = f"\nof {stages} stages: streams of stage {seen}, memory of stage {full}" if stages > 1 else ""
    step = format_seconds(result.step_time)
    return f"{label}: {step} a step, {result.exposed_share:.0%} of it exposed{undrawn}{part}{where}"


def write_compare(
    folder: Path,
    results: Sequence[SimResult],
    labels: Sequence[str],
    timelines: Sequence[SimResult],
    sweep: Sweep | None,
    title: str,
    facts: dict[str, str],
    gaps: Gaps | None = None,
    level: float = 0.9,
    where: str = "",
    refused: Mapping[str, str] | None = None,
) -> list[Path]:
    """index.md, index.html and PNGs of a comparison; returns what was written. level: of the intervals.
    where: network and machine of the sweep. refused: why further labels have no result."""
    heads = columns(level, (one.each for one in results))
    without = [[why, *[""] * (len(heads) - 1)] for why in (refused or {}).values()]
    written = [
        memory_figure(folder / "memory.png", results, labels, level),
        time_figure(folder / "time.png", results, labels, level=level),
    ]
    whiskers = f"Lines over the bars: a measured value lies between their ends with probability {level:.0%}."
    sections = [
        Section(
            "The strategies",
            f"{P_FITS}.",
            table=Table(heads, [*(row(result, level) for result in results), *without]),
        ),
        Section(
            "Memory by category",
            whiskers,
            picture=("memory.png", "device memory at the peak, by category, and the limit"),
        ),
        Section(
            "Step time by component",
            whiskers,
            picture=("time.png", "step time by component and exposed communication"),
        ),
    ]
    if sweep:
        written.append(sweep_figure(folder / "sweep.png", sweep, level, where))
        sections.append(
            Section(
                f"Over {sweep.setting}",
                sweep.held,
                table=_sweep_table(sweep, level),
                picture=("sweep.png", f"throughput over {sweep.setting}"),
            )
        )
    for index, (result, label) in enumerate(zip(timelines, labels, strict=False)):
        picture, section = _timeline_section(folder, f"timeline-{index + 1}.png", result, label)
        written.append(picture)
        sections.append(section)
    return written + write_page(folder, Page(title, summary(results, labels, gaps, level), sections, facts))


def _timeline_section(folder: Path, name: str, result: SimResult, label: str) -> tuple[Path, Section]:
    """The picture of a step's streams and memory, as `name` in `folder`, and its section."""
    heading = timeline_title(result, label)
    picture = timeline_plot(folder / name, result.spans, result.memory_curve, result.memory_limit, heading)
    text = "streams of one simulated step, and device memory"
    return picture, Section(f"Timeline of {label}", picture=(name, text))


def sweep_figure(path: Path, sweep: Sweep, level: float = 0.9, where: str = "") -> Path:
    """Throughput over the setting, crosses where memory ends. level: of the bands. where: the network and the
    machine, for the title, which says too what is held constant."""
    series = {
        label: [r.tokens_per_second_per_device if r and r.fits else None for r in points]
        for label, points in sweep.results.items()
    }
    reach = {
        label: max((v for v, y in zip(sweep.values, ys, strict=True) if y is not None), default=0)
        for label, ys in series.items()
    }
    far = max(reach.values())
    leaders = [label for label, value in reach.items() if value == far]
    name = sweep.names[list(sweep.values).index(far)] if far else ""
    unit = {"seq-len": "tokens"}.get(sweep.setting, sweep.setting)
    if not far:
        title = "Nothing fits anywhere in the sweep"
    elif len(leaders) == len(reach):
        place = list(sweep.values).index(far)
        first = max(series, key=lambda label: series[label][place] or 0.0)
        fastest = f"; {first} is fastest there" if len(reach) > 1 else ""
        title = f"All fit up to {name} {unit}{fastest}"
    else:
        title = f"{', '.join(leaders)} reach{'es' * (len(leaders) == 1)} {name} {unit}"
    xlabel = {"seq-len": "sequence length, tokens"}.get(sweep.setting, sweep.setting)
    below = "; ".join(filter(None, (where, sweep.held)))
    title = "\n".join(filter(None, (title, *wrap(below, TITLE))))
    per = rate(sweep.each)
    return sweep_lines(path, sweep.values, series, title, xlabel, per, sweep.names, sweep.bands, level)


def swept_table(sweep: Sweep, level: float = 0.9) -> Group:
    """Every point on the terminal: its numbers, and under them its plan. level: of the intervals."""
    per = rate(sweep.each).replace(" per", "\nper")
    shown = table(
        f"over {sweep.setting}; {sweep.held}", (sweep.setting, "strategy"),
        ("batch", "step", f"{level:.0%}", per, "exposed", "memory", "P(fits)"),
    )  # fmt: skip
    shown.padding = 0  # seven numbers in 80 columns
    plans = []
    for index, name in enumerate(sweep.names):
        for label, points in sweep.results.items():
            result = points[index]
            batch = f"{sweep.batches[index]:,}" if sweep.batches else ""
            if result is None:
                shown.add_row(name, label, batch, *["-"] * 6, style="red")
                why = sweep.refused.get(label, [""] * (index + 1))[index]
                plans.append(Text(f"{name} {label}: no legal strategy: {why}"))
                continue
            step = duration(result.step_time)
            shown.add_row(
                name, label, batch, step, beside(result.step_time_interval(level), step),
                f"{result.tokens_per_second_per_device:,.0f}", f"{result.exposed_share:.0%}",
                size(result.peak_memory), format_probability(result.p_fits) if result.fits else "out",
                style="" if result.fits else "red",
            )  # fmt: skip
            plans.append(Text(f"{name} {label}: {plan_line(result)}"))
    return Group(shown, *plans)


def _sweep_table(sweep: Sweep, level: float = 0.9) -> Table:
    """A row for each value and strategy, its plan among them."""
    numbers = columns(level, sweep.each)
    heads = [sweep.setting, *(["batch"] if sweep.batches else []), "label", *numbers]
    rows = []
    for index, name in enumerate(sweep.names):
        head = [name, *(f"{batch:,}" for batch in sweep.batches[index : index + 1])]
        for label, points in sweep.results.items():
            result = points[index]
            if result is None:
                why = sweep.refused[label][index] if label in sweep.refused else ""
                cells = [f"no legal strategy{': ' if why else ''}{why}", *[""] * (len(numbers) - 1)]
            else:
                cells = row(result, level)
            rows.append([*head, label, *cells])
    return Table(heads, rows)
