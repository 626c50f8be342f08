"""Views of a context sweep: throughput over context length, a plot and a table for each network."""

from typing import Any

from mopsim.common.units import format_count
from mopsim.intervals.spread import OUT
from mopsim.report.explore.page import View
from mopsim.report.explore.steps import ExplorerStep, Json, device, keyed, plot
from mopsim.report.tables import rate

_RATE = "tokens_per_s_per_device"
_COLUMNS = (
    ("context", "text", "context"), ("tokens", "number", "seq_len"), ("contender", "text", "contender"),
    ("verdict", "text", "verdict"), ("stopped by", "text", "stopped_by"),
    (rate(()), "number", _RATE), ("batch", "number", "global_batch"),
    ("step", "seconds", "step_time_s"), ("MFU", "fraction", "mfu"), ("memory", "bytes", "peak_memory_bytes"),
    ("host", "bytes", "host_memory_bytes"), ("gap", "fraction", "gap"), ("plan", "text", "strategy"),
)  # fmt: skip
"""Name, type, and key of a point; the name of the throughput is of the machine's devices."""


def context_views(result: Json, steps: list[ExplorerStep]) -> list[View]:
    """steps: none, the JSON has no whole ones."""
    found: list[View] = []
    for case in result["cases"]:
        each = device(case)
        columns = [(rate([each]) if key == _RATE else name, kind, key) for name, kind, key in _COLUMNS]
        where = f"{case['model']} on {case['devices']} {each}s"
        where += f" of {case['hardware']}" if case.get("hardware") else ""
        points = [
            _told(point, str(result["contenders"][name]["label"]))
            for name, curve in case["curves"].items()
            for point in curve["points"]
        ]
        held = (
            f"Held constant: {case['tokens_per_device']:,} tokens of a {each} and step (a sequence at least)."
        )
        marks = [_mark(one) for one in points]
        found += [
            _plot(f"Throughput over context length: {where}", held, result["lengths"], points, columns),
            keyed(f"Points: {where}", columns, points, held, marks),
        ]
    return found


def _told(point: Json, label: str) -> dict[str, Any]:
    return {**point, "contender": label, "context": format_count(point["seq_len"])}


def _mark(point: Json) -> str:
    return str(point["verdict"]) if point[_RATE] is not None else OUT


def _plot(
    title: str,
    note: str,
    lengths: list[int],
    points: list[dict[str, Any]],
    columns: list[tuple[str, str, str]],
) -> View:
    ticks = [[one, format_count(one)] for one in lengths]
    name = next(name for name, _, key in columns if key == _RATE)
    return plot(
        title,
        {"name": "context length", "type": "number", "log": True, "ticks": ticks},
        {"name": name, "type": "number", "zero": True},
        [
            (one["contender"], {
                "x": one["seq_len"], "y": one[_RATE], "mark": _mark(one),
                "rows": [(name, one.get(key), kind) for name, kind, key in columns if key != "contender"],
            })
            for one in points
        ],
        line=True,
        note=note,
    )  # fmt: skip


def reach(result: Json) -> str:
    """How far the first contender comes in each case."""
    first = next(iter(result["contenders"]))
    ends = [
        f"{case['model']} to "
        f"{format_count(longest) if (longest := case['curves'][first]['longest']) else 'none'}"
        for case in result["cases"]
        if first in case["curves"]
    ]
    return f"{result['contenders'][first]['label']} reaches: {', '.join(ends)}"
