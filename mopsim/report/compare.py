"""The comparison of strategies as a report: tables and figures that say which is fastest and what stops
the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import SimResult
from mopsim.report.findings import headline
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.report.plots import Bar, memory_bars, remark, time_bars
from mopsim.report.sweep import Sweep, sweep_figure, swept_rows
from mopsim.report.tables import P_FITS, columns, row
from mopsim.report.timeline import timeline_plot


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
        title or f"Simulated step: {headline(results, labels)}",
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
    said: str,
    level: float = 0.9,
    where: str = "",
    refused: Mapping[str, str] | None = None,
) -> list[Path]:
    """index.md, index.html and PNGs of a comparison; returns what was written. said: its headline. level:
    of the intervals. where: network and machine of the sweep. refused: why further labels have no result."""
    heads = list(columns(level, (one.each for one in results)))
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
                table=swept_rows(sweep, level),
                picture=("sweep.png", f"throughput over {sweep.setting}"),
            )
        )
    for index, (result, label) in enumerate(zip(timelines, labels, strict=False)):
        picture, section = _timeline_section(folder, f"timeline-{index + 1}.png", result, label)
        written.append(picture)
        sections.append(section)
    return written + write_page(folder, Page(title, said, sections, facts))


def _timeline_section(folder: Path, name: str, result: SimResult, label: str) -> tuple[Path, Section]:
    """The picture of a step's streams and memory, as `name` in `folder`, and its section."""
    heading = timeline_title(result, label)
    picture = timeline_plot(folder / name, result.spans, result.memory_curve, result.memory_limit, heading)
    text = "streams of one simulated step, and device memory"
    return picture, Section(f"Timeline of {label}", picture=(name, text))
