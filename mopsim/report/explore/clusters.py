"""Views of a sizing: the clusters that were tried, cost against time, days over nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

from mopsim.common.units import format_nodes
from mopsim.intervals.spread import OUT
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

_CLUSTER = (
    ("hardware", "text", "hardware"), ("nodes", "number", "nodes"), ("GPUs", "number", "gpus"),
    ("in time", "text", "in_time"), ("within budget", "text", "within_budget"), ("days", "number", "days"),
    ("days at least", "number", "days least"), ("days at most", "number", "days most"),
    ("P(deadline)", "probability", "p_deadline"), ("cost", "dollars", "cost_usd"),
    ("cost at least", "dollars", "cost least"), ("cost at most", "dollars", "cost most"),
    ("goodput", "fraction", "goodput"), ("plan", "text", "plan"), ("purchase", "dollars", "capex_usd"),
    ("energy", "joules", "energy_j"), ("CO2, t", "number", "carbon_t"), ("site", "text", "site"),
    ("reason", "text", "reason"),
)  # fmt: skip
"""Name, type, and key of a cluster."""


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
        "recommended" if (one["hardware"], one["nodes"]) == chosen else OUT if "no" in _answers(one) else ""
        for one in rows
    ]
    costed = [one for one in rows if one["days"] is not None and one.get("cost_usd") is not None]
    note = "Green: recommended. Grey: does not meet the limits."
    views = [keyed("Clusters that were tried", _CLUSTER, rows, note, marks)]
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
    return [(f"{name}, {format_nodes(best['nodes'])}", best) for name, best in found]


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["in_time"], row["within_budget"]


def _said(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _cluster(one: Json) -> dict[str, Any]:
    """A cluster by the keys of _CLUSTER, from either way in which `size` says it."""
    seconds, carbon = one.get("duration_s"), one.get("carbon_kg")
    found: dict[str, Any] = {name: _said(one.get(name)) for name in ("in_time", "within_budget")}
    for name in ("days", "cost"):
        found |= zip((f"{name} least", f"{name} most"), ends(one, f"{name}_interval"), strict=True)
    return {
        **one, **found, "gpus": one.get("gpus") or one.get("devices"),
        "days": one.get("days") or (seconds / DAY if seconds else None),
        "plan": plan_of(one["strategy"]) if one.get("strategy") else None,
        "carbon_t": carbon / 1e3 if carbon else None,
    }  # fmt: skip


def _cluster_rows(one: dict[str, Any]) -> list[tuple[str, Any, str]]:
    return [(name, one.get(key), kind) for name, kind, key in _CLUSTER if key != "hardware"]


def _pair(one: dict[str, Any], name: str) -> list[float] | None:
    low, high = one[f"{name} least"], one[f"{name} most"]
    return None if low is None or high is None else [low, high]


def _scatter(title: str, rows: Sequence[dict[str, Any]], result: Json) -> View:
    best = front([(one["days"], one["cost_usd"]) for one in rows])
    deadline = result.get("deadline_s")
    return plot(
        title,
        {"name": "days", "type": "number", "log": True},
        {"name": "cost", "type": "dollars", "log": True},
        [
            (one["hardware"], {
                "x": one["days"], "y": one["cost_usd"], "xr": _pair(one, "days"), "yr": _pair(one, "cost"),
                "name": format_nodes(one['nodes']), "mark": "", "front": ahead, "rows": _cluster_rows(one),
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
                "name": format_nodes(one['nodes']), "rows": _cluster_rows(one),
            })
            for one in sorted(rows, key=lambda one: (machines.index(one["hardware"]), one["nodes"]))
        ],
        line=True,
    )  # fmt: skip
