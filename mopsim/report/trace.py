"""A simulated step as a Chrome/Perfetto trace."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mopsim.engine import Span
from mopsim.spec.io import write_text


def chrome_trace(
    spans: Sequence[Span],
    curve: Sequence[tuple[float, float]],
    categories: Mapping[str, Sequence[int]],
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """The Trace Event Format (microseconds): a thread per stream, and counters of device memory in bytes."""
    streams = list(dict.fromkeys(span.stream for span in spans))
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "rank"}}]
    for tid, stream in enumerate(streams):
        events.append({"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": stream}})
        events.append(
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}}
        )
    place = {stream: tid for tid, stream in enumerate(streams)}
    for span in spans:
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": place[span.stream],
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "name": span.name,
                "cat": f"{span.component},{span.phase}",
                "args": {"component": span.component, "phase": span.phase},
            }
        )
    events += [
        {"ph": "C", "pid": 0, "ts": t * 1e6, "name": "device memory", "args": {"bytes": value}}
        for t, value in curve
    ]
    for name, values in categories.items():
        if not any(values):
            continue
        for (t, _), value in zip(curve, values, strict=True):
            events.append(
                {"ph": "C", "pid": 0, "ts": t * 1e6, "name": f"memory: {name}", "args": {"bytes": value}}
            )
    return {"traceEvents": events, "displayTimeUnit": "ms", "metadata": metadata}


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write a trace for chrome://tracing or ui.perfetto.dev."""
    write_text(path, json.dumps(trace, separators=(",", ":")))
