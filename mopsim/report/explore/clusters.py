"""Views of a sizing: the clusters that were tried, cost against time, days over nodes."""

from collections.abc import Sequence
from typing import Any

from mopsim.report.explore.page import View
from mopsim.report.explore.steps import Json, Step, bars, ends, front, plan_of, step_table, table

DAY = 86400.0
_CLUSTER = [
    ("hardware", "text"), ("nodes", "number"), ("GPUs", "number"), ("in time", "text"), ("days", "number"),
    ("days at least", "number"), ("days at most", "number"), ("P(deadline)", "fraction"), ("cost", "dollars"),
    ("cost at least", "dollars"), ("cost at most", "dollars"), ("goodput", "fraction"), ("plan", "text"),
    ("reason", "text"),
]  # fmt: skip


def _clusters(result: Json) -> list[dict[str, Any]]:
    """Every cluster that was tried, as one list of rows."""
    if result.get("points"):
        return [dict(one) for one in result["points"]]
    return [
        {"hardware": machine["name"], **one} for machine in result["hardware"] for one in machine["tried"]
    ]


def cluster_views(result: Json, steps: list[Step]) -> list[View]:
    rows = [_cluster(one) for one in _clusters(result)]
    best = result.get("recommended") or {}
    chosen = (best.get("hardware"), best.get("nodes"))
    marks = [
        "recommended"
        if (one["hardware"], one["nodes"]) == chosen
        else ""
        if one["in time"] == "yes"
        else "over"
        for one in rows
    ]
    cells = [[one[name] for name, _ in _CLUSTER] for one in rows]
    costed = [one for one in rows if one["days"] is not None and one["cost"] is not None]
    views = [
        table("Clusters that were tried", _CLUSTER, cells, "Green: recommended. Grey: not in time.", marks)
    ]
    if costed:
        views.append(_scatter("Cost against time", costed, result))
    timed = [one for one in rows if one["days"] is not None]
    if timed:
        views.append(_scaling(timed))
    if steps:
        views += [step_table("The step on the smallest cluster in time", steps), *bars(steps)]
    return views


def _cluster(one: Json) -> dict[str, Any]:
    """A row of _CLUSTER, from either way in which `size` says it."""
    seconds = one.get("duration_s")
    days, cost = ends(one, "days_interval"), ends(one, "cost_interval")
    in_time = one.get("in_time")
    return {
        "hardware": one["hardware"], "nodes": one["nodes"], "GPUs": one.get("gpus") or one.get("devices"),
        "in time": "" if in_time is None else "yes" if in_time else "no",
        "days": one.get("days") or (seconds / DAY if seconds else None),
        "days at least": days[0], "days at most": days[1], "P(deadline)": one.get("p_deadline"),
        "cost": one.get("cost_usd"), "cost at least": cost[0], "cost at most": cost[1],
        "goodput": one.get("goodput"), "plan": plan_of(one["strategy"]) if one.get("strategy") else None,
        "reason": one.get("reason"),
    }  # fmt: skip


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault(one["hardware"], []).append(one)
    return groups


def _cluster_rows(one: dict[str, Any]) -> list[tuple[str, Any, str]]:
    return [(name, one[name], kind) for name, kind in _CLUSTER if name != "hardware"]


def _pair(one: dict[str, Any], name: str) -> list[float] | None:
    low, high = one[f"{name} at least"], one[f"{name} at most"]
    return None if low is None or high is None else [low, high]


def _scatter(title: str, rows: Sequence[dict[str, Any]], result: Json) -> View:
    best = dict(zip(map(id, rows), front([(one["days"], one["cost"]) for one in rows]), strict=True))
    series = [
        {
            "name": name, "line": False,
            "points": [
                {"x": one["days"], "y": one["cost"], "xr": _pair(one, "days"), "yr": _pair(one, "cost"),
                 "name": f"{one['nodes']} nodes", "mark": "", "front": best[id(one)],
                 "rows": _cluster_rows(one)}
                for one in group
            ],
        }
        for name, group in _grouped(rows).items()
    ]  # fmt: skip
    deadline = result.get("deadline_s")
    return {
        "kind": "plot", "title": title, "note": f"Asked: {deadline / DAY:g} days." if deadline else "",
        "x": {"name": "days", "type": "number"}, "y": {"name": "cost", "type": "dollars"},
        "series": series,
    }  # fmt: skip


def _scaling(rows: Sequence[dict[str, Any]]) -> View:
    counts = sorted({one["nodes"] for one in rows})
    series = [
        {
            "name": name, "line": True,
            "points": [
                {"x": one["nodes"], "y": one["days"], "yr": _pair(one, "days"), "mark": "",
                 "name": f"{one['nodes']} nodes", "rows": _cluster_rows(one)}
                for one in sorted(group, key=lambda one: one["nodes"])
            ],
        }
        for name, group in _grouped(rows).items()
    ]  # fmt: skip
    ticks = [[one, f"{one:,}"] for one in counts] if len(counts) <= 8 else None
    return {
        "kind": "plot", "title": "Days over nodes", "series": series,
        "x": {"name": "nodes", "type": "number", "log": True, "ticks": ticks},
        "y": {"name": "days", "type": "number", "log": True},
    }  # fmt: skip
