"""Views of a sizing: the clusters that were tried, cost against time, days over nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

from mopsim.report.explore.page import View
from mopsim.report.explore.steps import (
    ExplorerStep,
    Json,
    bars,
    ends,
    front,
    keyed,
    plan_of,
    plot,
    proofs,
    step_table,
)
from mopsim.size.figures import DAY

_CLUSTER = [
    ("hardware", "text"), ("nodes", "number"), ("GPUs", "number"), ("in time", "text"),
    ("within budget", "text"), ("days", "number"),
    ("days at least", "number"), ("days at most", "number"), ("P(deadline)", "fraction"), ("cost", "dollars"),
    ("cost at least", "dollars"), ("cost at most", "dollars"), ("goodput", "fraction"), ("plan", "text"),
    ("purchase", "dollars"), ("energy", "joules"), ("CO2, t", "number"), ("site", "text"), ("reason", "text"),
]  # fmt: skip


def _clusters(result: Json) -> list[dict[str, Any]]:
    """Every cluster that was tried, as one list of rows; first those that fit, which say more."""
    tried = [
        {"hardware": machine["name"], **one} for machine in result["hardware"] for one in machine["tried"]
    ]
    points = [dict(one) for one in result.get("points") or []]
    known = {(one["hardware"], one["nodes"]) for one in points}
    return points + [one for one in tried if (one["hardware"], one["nodes"]) not in known]


def cluster_views(result: Json, steps: list[ExplorerStep]) -> list[View]:
    rows = [_cluster(one) for one in _clusters(result)]
    best = result.get("recommended") or {}
    chosen = (best.get("hardware"), best.get("nodes"))
    marks = [
        "recommended"
        if (one["hardware"], one["nodes"]) == chosen
        else _UNFIT
        if "no" in _answers(one)
        else ""
        for one in rows
    ]
    costed = [one for one in rows if one["days"] is not None and one["cost"] is not None]
    views = [
        keyed(
            "Clusters that were tried",
            [(name, kind, name) for name, kind in _CLUSTER],
            rows,
            "Green: recommended. Grey: will not do.",
            marks,
        )
    ]
    if costed:
        views.append(_scatter("Cost against time", costed, result))
    timed = [one for one in rows if one["days"] is not None]
    if timed:
        views.append(_scaling(timed))
    if steps:
        title = "The step on the best cluster of each machine type"
        views += [step_table(title, steps, proofs(_searched(result))), *bars(steps)]
    return views


def _searched(result: Json) -> list[tuple[str, Json]]:
    """(cluster, what its search left out) of the best of each machine type."""
    found = [(one["name"], one["best"]) for one in result["hardware"] if one.get("best")]
    return [(f"{name}, {best['nodes']} nodes", best) for name, best in found]


_UNFIT = "out of memory"
"""The mark of a cluster that will not do, as of a strategy that does not fit."""


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["in time"], row["within budget"]


def _said(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _cluster(one: Json) -> dict[str, Any]:
    """A row of _CLUSTER, from either way in which `size` says it."""
    seconds = one.get("duration_s")
    days, cost = ends(one, "days_interval"), ends(one, "cost_interval")
    return {
        "hardware": one["hardware"], "nodes": one["nodes"], "GPUs": one.get("gpus") or one.get("devices"),
        "in time": _said(one.get("in_time")), "within budget": _said(one.get("within_budget")),
        "days": one.get("days") or (seconds / DAY if seconds else None),
        "days at least": days[0], "days at most": days[1], "P(deadline)": one.get("p_deadline"),
        "cost": one.get("cost_usd"), "cost at least": cost[0], "cost at most": cost[1],
        "goodput": one.get("goodput"), "plan": plan_of(one["strategy"]) if one.get("strategy") else None,
        "reason": one.get("reason"), "purchase": one.get("capex_usd"), "energy": one.get("energy_j"),
        "CO2, t": one["carbon_kg"] / 1e3 if one.get("carbon_kg") else None, "site": one.get("site"),
    }  # fmt: skip


def _cluster_rows(one: dict[str, Any]) -> list[tuple[str, Any, str]]:
    return [(name, one[name], kind) for name, kind in _CLUSTER if name != "hardware"]


def _pair(one: dict[str, Any], name: str) -> list[float] | None:
    low, high = one[f"{name} at least"], one[f"{name} at most"]
    return None if low is None or high is None else [low, high]


def _scatter(title: str, rows: Sequence[dict[str, Any]], result: Json) -> View:
    best = front([(one["days"], one["cost"]) for one in rows])
    deadline = result.get("deadline_s")
    return plot(
        title,
        {"name": "days", "type": "number", "log": True},
        {"name": "cost", "type": "dollars"},
        [
            (one["hardware"], {
                "x": one["days"], "y": one["cost"], "xr": _pair(one, "days"), "yr": _pair(one, "cost"),
                "name": f"{one['nodes']} nodes", "mark": "", "front": ahead, "rows": _cluster_rows(one),
            })
            for one, ahead in zip(rows, best, strict=True)
        ],
        note=f"Asked: {deadline / DAY:g} days." if deadline else "",
    )  # fmt: skip


def _scaling(rows: Sequence[dict[str, Any]]) -> View:
    machines = list(dict.fromkeys(one["hardware"] for one in rows))
    counts = sorted({one["nodes"] for one in rows})
    ticks = [[one, f"{one:,}"] for one in counts] if len(counts) <= 8 else None
    return plot(
        "Days over nodes",
        {"name": "nodes", "type": "number", "log": True, "ticks": ticks},
        {"name": "days", "type": "number", "log": True},
        [
            (one["hardware"], {
                "x": one["nodes"], "y": one["days"], "yr": _pair(one, "days"), "mark": "",
                "name": f"{one['nodes']} nodes", "rows": _cluster_rows(one),
            })
            for one in sorted(rows, key=lambda one: (machines.index(one["hardware"]), one["nodes"]))
        ],
        line=True,
    )  # fmt: skip
