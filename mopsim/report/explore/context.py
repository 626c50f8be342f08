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
    ("verdict", "text", "verdict"), ("P(fits)", "probability", "p_fits"),
    ("stopped by", "text", "stopped_by"), (rate(()), "number", _RATE), ("batch", "number", "global_batch"),
    ("step", "seconds", "step_time_s"), ("MFU", "fraction", "mfu"), ("memory", "bytes", "peak_memory_bytes"),
    ("host", "bytes", "host_memory_bytes"), ("gap", "fraction", "gap"), ("plan", "text", "strategy"),
)  # fmt: skip
"""Name, type, and key of a point; the name of the throughput is of the machine's devices."""
_LEADS = (
    ("context", "text", "context"), ("compared with", "text", "below"), ("times as fast", "number", "ratio"),
    ("at least", "number", "low"), ("at most", "number", "high"),
    ("P(faster)", "probability", "p_faster"),
)  # fmt: skip
_RULES = (("contender", "text", "label"), ("stack", "text", "stack"), ("rules", "text", "rules"))


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
        step = f"{case['tokens_per_device']:,} tokens per {each} and step"
        held = f"Held constant: {step} (at least one sequence)."
        marks = [_mark(one) for one in points]
        found += [
            _plot(f"Throughput over context length: {where}", held, result["lengths"], points, columns),
            keyed(f"Points: {where}", columns, points, held, marks),
            *_leads(result, case, where),
        ]
    return [*found, *_contenders(result)]


def _leads(result: Json, case: Json, where: str) -> list[View]:
    """How many times as fast the first contender is as each other; nothing in files of before."""
    labels = {name: str(one["label"]) for name, one in result["contenders"].items()}
    rows = [
        {
            **one, "below": labels[name], "context": format_count(one["seq_len"]),
            "low": one["ratio_interval"][0], "high": one["ratio_interval"][1],
        }
        for name, found in (case.get("ratios") or {}).items() for one in found
    ]  # fmt: skip
    if not rows:
        return []
    first = next(iter(labels.values()))
    note = (
        f"at least, at most: a measured ratio lies between them with a probability of "
        f"{rows[0]['interval']:.0%}. P(faster): the probability that {first} is the faster one in a run. "
        f"Ratios are of plan and software together."
    )
    return [keyed(f"{first} against the others: {where}", _LEADS, rows, note)]


def _contenders(result: Json) -> list[View]:
    """What each contender may do, and the software that it runs on; nothing in files of before."""
    rows = [
        {**one, "stack": f"{one['stack']}{' (an assumption, no one program)' * one['stack_assumed']}"}
        for one in result["contenders"].values()
        if "stack" in one
    ]
    return [keyed("Contenders", _RULES, rows)] if rows else []


def cases_in_words(result: Json) -> str:
    """'qwen3_30b_a3b, mop_120b on h200-sxm-141g'."""
    models = ", ".join(dict.fromkeys(str(case["model"]) for case in result["cases"]))
    machines = ", ".join(
        dict.fromkeys(str(case["hardware"]) for case in result["cases"] if "hardware" in case)
    )
    return f"{models} on {machines}" if machines else models


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
