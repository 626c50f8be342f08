"""Views of a sweep: throughput over a setting, with the plan at each point."""

from typing import Any

from mopsim.common.units import format_count
from mopsim.intervals.spread import OUT
from mopsim.report.explore.page import View
from mopsim.report.explore.steps import Cell, ExplorerStep, Json, device, ends, plot, table, told
from mopsim.report.tables import NO_STRATEGY, rate


def sweep_views(sweep: Json, where: str) -> list[View]:
    """Throughput over a setting, the plan at each point, and the points as a table. where: 'MODEL on
    HARDWARE', for the titles."""
    values, batches = sweep["values"], sweep.get("global_batch") or [None] * len(sweep["values"])
    held = f", {sweep['hold'].replace('_', ' ')} held constant" if sweep.get("hold") else ""
    place = f": {where}" if where else ""
    points, rows, marks = [], [], []
    per = rate(device(one) for found in sweep["results"].values() for one in found if one)
    for label, found in sweep["results"].items():
        refused = sweep.get("refused", {}).get(label) or [None] * len(values)
        for value, batch, one, why in zip(values, batches, found, refused, strict=True):
            step = ExplorerStep(label, one) if one else None
            rows.append([value, label, batch, *_swept(step, why)])
            marks.append(step.state if step else OUT)
            points.append((label, _swept_point(value, batch, step, why)))
    names = [
        (sweep["setting"], "number"), ("label", "text"), ("batch", "number"), ("verdict", "text"),
        ("P(fits)", "probability"), ("step", "seconds"), (per, "number"), ("memory", "bytes"),
        ("plan", "text"),
    ]  # fmt: skip
    title = f"Throughput over {sweep['setting']}{held}{place}"
    ticks = [[one, format_count(one)] for one in values]
    axis = {"name": sweep["setting"], "type": "number", "log": True, "ticks": ticks}
    drawn = plot(title, axis, {"name": per, "type": "number", "zero": True}, points, line=True)
    return [drawn, table(f"Points over {sweep['setting']}{held}{place}", names, rows, marks=marks)]


def _swept(step: ExplorerStep | None, why: str | None) -> list[Cell]:
    if step is None:
        return [NO_STRATEGY, None, None, None, None, why or ""]
    one = step.found
    return [
        step.state,
        one.get("p_fits"),
        one["step_time_s"],
        one["tokens_per_s_per_device"],
        one["peak_memory_bytes"],
        step.plan,
    ]


def _swept_point(value: float, batch: int | None, step: ExplorerStep | None, why: str | None) -> View:
    rows: list[Any] = [("at", value, "number"), ("batch", batch, "number")]
    if step is None or not step.found["fits"]:
        told_ = told(step) if step else [("", f"{NO_STRATEGY}: {why or ''}", "text")]
        return {"x": value, "y": None, "mark": OUT, "rows": [*rows, *told_]}
    one, (low, high) = step.found, ends(step.found, "step_time_interval_s")
    rate = one["tokens_per_s_per_device"] * one["step_time_s"]
    return {
        "x": value, "y": one["tokens_per_s_per_device"], "mark": step.state, "rows": [*rows, *told(step)],
        "yr": [rate / high, rate / low] if low and high else None,
    }  # fmt: skip
