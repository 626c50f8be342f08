"""A simulated step as a Chrome/Perfetto trace."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mopsim.engine import SimResult
from mopsim.report.lanes import lane, lanes

Event = dict[str, Any]
MICROSECONDS = 1e6


def chrome_trace(timeline: SimResult, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The Trace Event Format (times in microseconds) of a step that was simulated with its timeline: a
    process per stage, a thread per stream, an asynchronous slice per microbatch and direction, and counters
    of device memory in bytes. Repetitions of a microbatch that are composed rather than played are not
    drawn: the metadata says how many of how many are."""
    counts = {
        "microbatches": timeline.training.num_microbatches(timeline.strategy),
        "microbatches_drawn": timeline.drawn_microbatches,
        "step_time_s": timeline.step_time,
    }
    streams = lanes(span.stream for span in timeline.spans)
    events = [*_names(timeline, streams), *_slices(timeline, streams), *_microbatches(timeline)]
    events += _counters(timeline)
    return {"traceEvents": events, "displayTimeUnit": "ms", "metadata": {**metadata, **counts}}


def _names(timeline: SimResult, streams: Sequence[str]) -> Iterator[Event]:
    for stage in sorted({timeline.span_stage, timeline.memory_stage}):
        shows = [
            what
            for what, where in (("streams", timeline.span_stage), ("memory", timeline.memory_stage))
            if where == stage
        ]
        name = {"name": f"a rank of stage {stage}: {' and '.join(shows)}"}
        yield {"ph": "M", "pid": stage, "tid": 0, "name": "process_name", "args": name}
    for tid, stream in enumerate(streams):
        at = {"ph": "M", "pid": timeline.span_stage, "tid": tid}
        yield {**at, "name": "thread_name", "args": {"name": lane(stream)}}
        yield {**at, "name": "thread_sort_index", "args": {"sort_index": tid}}


def _slices(timeline: SimResult, streams: Sequence[str]) -> Iterator[Event]:
    place = {stream: tid for tid, stream in enumerate(streams)}
    for span in timeline.spans:
        yield {
            "ph": "X",
            "pid": timeline.span_stage,
            "tid": place[span.stream],
            "ts": span.start * MICROSECONDS,
            "dur": (span.end - span.start) * MICROSECONDS,
            "name": span.name,
            "cat": f"{span.component},{span.phase}",
            "args": {"component": span.component, "phase": span.phase, "microbatch": span.microbatch},
        }


def _microbatches(timeline: SimResult) -> Iterator[Event]:
    """From the first op of a microbatch's forward (or of its recompute and backward) to its last."""
    ends: dict[tuple[int, str], tuple[float, float]] = {}
    for span in timeline.spans:
        if span.microbatch >= 0:
            key = span.microbatch, "forward" if span.phase == "forward" else "backward"
            start, end = ends.get(key, (span.start, span.end))
            ends[key] = min(start, span.start), max(end, span.end)
    for (index, way), (start, end) in ends.items():
        at = {
            "cat": "microbatch", "id": f"{way} {index}", "pid": timeline.span_stage, "tid": 0,
            "name": f"microbatch {index} {way}",
        }  # fmt: skip
        yield {**at, "ph": "b", "ts": start * MICROSECONDS}
        yield {**at, "ph": "e", "ts": end * MICROSECONDS}


def _counters(timeline: SimResult) -> Iterator[Event]:
    """Every value in order; those of ops without a duration share one time."""
    series = [("device memory", [value for _, value in timeline.memory_curve])]
    by_category = timeline.memory_curve_by_category
    series += [(f"memory: {name}", list(found)) for name, found in by_category.items() if any(found)]
    for name, values in series:
        for (time, _), value in zip(timeline.memory_curve, values, strict=True):
            yield {
                "ph": "C", "pid": timeline.memory_stage, "tid": 0, "ts": time * MICROSECONDS, "name": name,
                "args": {"bytes": value},
            }  # fmt: skip
