"""The comparison of strategies as a report: tables and figures that say which is fastest and what stops
the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import SimResult
from mopsim.report.findings import headline, leaders
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.plots import Bar, memory_bars, remark, time_bars
from mopsim.report.sweep import Sweep, sweep_figure, swept_rows
from mopsim.report.tables import ROUTED, columns, dry_run_only, p_fits, row
from mopsim.report.timeline import timeline_plot


def memory_figure(path: Path, results: Mapping[str, SimResult], level: float | None = None) -> None:
    """Memory at the peak by category, with the limit; the title says who fits, the bars what
    lies on the host beside it. level: of an interval that is
    drawn over each bar."""
    lost = [label for label, result in results.items() if not result.fits]
    title = f"Device memory: {', '.join(lost)} over the limit" if lost else _least(results)
    bars = [
        Bar(
            label,
            {k: float(v) for k, v in r.memory_by_category.items()},
            _memory_remark(r),
            not r.fits,
            r.peak_memory_interval(level) if level else None,
            level,
        )
        for label, r in results.items()
    ]
    limit = min(result.memory_limit for result in results.values())
    near = limit < 3 * max(result.peak_memory for result in results.values())
    memory_bars(path, bars, limit if near else None, title)


def _least(results: Mapping[str, SimResult]) -> str:
    peak, label = min((r.peak_memory, label) for label, r in results.items())
    most = max(r.peak_memory for r in results.values())
    return (
        f"Device memory: {label} needs the least, {peak / most:.0%} of the largest"
        if len(results) > 1
        else f"Device memory of {label} at its peak"
    )


def _memory_remark(result: SimResult) -> str:
    if result.fits:
        share = result.peak_memory / result.memory_limit
        host = f", and {format_bytes(result.host_memory)} of host memory" if result.host_memory else ""
        return f"{format_bytes(result.peak_memory)} ({share:.0%} of the limit){host}"
    return f"{format_bytes(result.over_bytes)} over: {result.over}"


def time_figure(
    path: Path, results: Mapping[str, SimResult], level: float | None = None, title: str = ""
) -> None:
    """The step by component, and how much of it is exposed to what. level: of an interval that is drawn over
    each step. title: instead of who is fastest, as simulated."""
    bars, waits = [], []
    for label, result in results.items():
        speed = f"{result.speed} on {result.stack.name}"
        note = speed if result.fits else remark(result.over, result.over_bytes)
        ends = result.step_time_interval(level) if level else None
        bars.append(Bar(label, result.time_by_component, note, not result.fits, ends, level))
        waits.append(Bar(label, result.waits, f"{result.exposed_share:.0%} of the step"))
    most = max((sum(result.exposed.values()), label) for label, result in results.items())
    together = ", plan and software together" if leaders(results) else ""
    titles = (
        title or f"Simulated step: {headline(results)}{together}",
        f"Exposed: {most[1]} most, {format_seconds(most[0])}",
    )
    time_bars(path, bars, waits, titles)


def write_compare(
    folder: Path,
    results: Mapping[str, SimResult],
    timelines: Sequence[SimResult],
    sweep: Sweep | None,
    title: str,
    facts: dict[str, str],
    said: str,
    level: float = 0.9,
    where: str = "",
    refused: Mapping[str, str] | None = None,
) -> None:
    """index.md, index.html and PNGs of a comparison. said: its headline. level: of the intervals. where:
    network and machine of the sweep. refused: why further labels have no result."""
    heads = list(columns(level, (one.each for one in results.values())))
    without = [[why, *[""] * (len(heads) - 1)] for why in (refused or {}).values()]
    memory_figure(folder / "memory.png", results, level)
    time_figure(folder / "time.png", results, level)
    within = f"a measured value lies between their ends with probability {level:.0%}{ROUTED}"
    whiskers = f"Lines over the bars: {within}."
    sections = [
        Section(
            "The strategies",
            f"{p_fits(said)}. {dry_run_only([*results.values()])}".rstrip(),
            table=Table(heads, [*(row(result, level) for result in results.values()), *without]),
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
        sweep_figure(folder / "sweep.png", sweep, level, where)
        sections.append(
            Section(
                f"Over {sweep.setting}",
                "; ".join(filter(None, (sweep.held, sweep.part))),
                table=swept_rows(sweep, level),
                picture=("sweep.png", f"throughput over {sweep.setting}"),
            )
        )
    shows = "streams of one simulated step, and device memory"
    for index, (result, label) in enumerate(zip(timelines, results, strict=False), 1):
        name = f"timeline-{index}.png"
        timeline_plot(folder / name, result, label, result.memory_limit)
        sections.append(Section(f"Timeline of {label}", picture=(name, shows)))
    write_page(folder, Page(title, said, sections, facts))
