"""A simulated step as a picture: streams over time, memory below."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.patches import Patch

from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import SimResult
from mopsim.report.lanes import explained, lane, lanes, named
from mopsim.report.palette import colour, in_order
from mopsim.report.style import byte_scale, figure, time_scale


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


def timeline_plot(path: Path, result: SimResult, label: str, limit: float | None = None) -> None:
    """Gantt chart of a step that was simulated with its timeline, one lane per stream, by component or kind
    of transfer, over the device memory curve. limit: of that, where it is to be drawn."""
    spans, curve = result.spans, result.memory_curve
    streams = lanes(span.stream for span in spans)
    end = max([*(span.end for span in spans), *(time for time, _ in curve)], default=1.0)
    unit, scale = time_scale(end)
    with figure(
        path, 12, 3.6 + 0.5 * len(streams), 2, sharex=True, height_ratios=[max(len(streams), 2), 2.2]
    ) as (top, memory):
        for row, stream in enumerate(streams):
            for what in dict.fromkeys(span.drawn_as for span in spans if span.stream == stream):
                chosen = [s for s in spans if s.stream == stream and s.drawn_as == what and s.end > s.start]
                top.broken_barh(
                    [(s.start / scale, (s.end - s.start) / scale) for s in chosen],
                    (row - 0.4, 0.8),
                    color=colour(what),
                    # an edge shows a copy of microseconds; on the compute lane it would hide its neighbours
                    linewidth=0.0 if stream == "compute" else 0.5,
                )
        top.set_yticks(range(len(streams)), [lane(stream) for stream in streams])
        top.invert_yaxis()
        top.set_title(timeline_title(result, label))
        drawn_kinds = in_order(span.drawn_as for span in spans)
        handles = [Patch(color=colour(name), label=named(name, "components")) for name in drawn_kinds]
        top.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
        size, factor = byte_scale(max([value for _, value in curve] + [1]))
        drawn = to_the_end(curve, end)
        times, values = [t / scale for t, _ in drawn], [value / factor for _, value in drawn]
        memory.fill_between(times, values, step="post", color="#d7bde2")
        if limit and curve and limit < 1.6 * max(value for _, value in curve):
            memory.axhline(limit / factor, color="#c0392b", linestyle="--")
            memory.annotate(
                f" limit {format_bytes(limit)}", (1.0, limit / factor), xycoords=("axes fraction", "data"),
                va="center", color="#c0392b", annotation_clip=False,
            )  # fmt: skip
        memory.set_ylim(bottom=0)
        memory.set_ylabel(f"device memory, {size}")
        memory.set_xlabel("\n".join(filter(None, (f"time in the step, {unit}", explained(streams)))))


def to_the_end(curve: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """What the last event leaves stays until the step's end (seconds)."""
    return [*curve, (end, curve[-1][1])] if curve and curve[-1][0] < end else list(curve)
