"""Views of a validation: runs, predicted against measured, what is unsupported, components."""

from collections.abc import Sequence

from mopsim.report.explore.page import View
from mopsim.report.explore.steps import ExplorerStep, Json, ends, keyed, likely, plot, state_of, table

_QUANTITIES = (("Step time", "seconds", "step_time_s"), ("Peak memory", "bytes", "peak_memory_bytes"))
_ENDS = {"step": "predicted_step_time_interval_s", "memory": "predicted_peak_memory_interval_bytes"}
"""The intervals of a run, by what their columns begin with."""
_RUN: tuple[tuple[str, str, str], ...] = (
    ("run", "text", "run_id"), ("verdict", "text", "state"), ("P(fits)", "probability", "p_fits"),
    ("measured step", "seconds", "measured_step_time_s"),
    ("predicted step", "seconds", "predicted_step_time_s"), ("error", "fraction", "step_time_s_error"),
    ("step at least", "seconds", "step low"), ("step at most", "seconds", "step high"),
    ("measured memory", "bytes", "measured_peak_memory_bytes"),
    ("predicted memory", "bytes", "predicted_peak_memory_bytes"),
    ("memory error", "fraction", "peak_memory_bytes_error"),
    ("memory at least", "bytes", "memory low"), ("memory at most", "bytes", "memory high"),
    ("source", "text", "source"),
    ("family", "text", "family"), ("model", "text", "model"), ("GPU", "text", "gpu"),
    ("GPUs", "number", "num_gpus"), ("precision", "text", "precision"), ("grade", "text", "quality"),
    ("stack", "text", "stack"),
)  # fmt: skip


def run_views(result: Json, steps: list[ExplorerStep]) -> list[View]:
    """Predicted against measured: a table, two scatters, and what is unsupported."""
    simulated = [one for one in result["runs"] if one["status"] == "simulated"]
    known = [{**one, "state": _state(one), **_ends(one)} for one in simulated]
    marks = [str(one["state"]) for one in known]
    level = result["summary"].get("interval")  # none in files of before
    note = (
        f"at least, at most: the measured value lies between them with a probability of {level:.0%}."
        if level
        else ""
    )
    views = [keyed("Runs", _RUN, known, note, marks)]
    views += [
        _against(title, kind, key, simulated)
        for title, kind, key in _QUANTITIES
        if any(one.get(f"measured_{key}") and one.get(f"predicted_{key}") for one in simulated)
    ]
    refused = [[one["run_id"], one["reason"]] for one in result["runs"] if one["status"] != "simulated"]
    if refused:
        views.append(table("Unsupported runs", [("run", "text"), ("reason", "text")], refused))
    parts = result.get("components") or []
    if parts:
        kept = [("component", "text"), ("metric", "text"), ("params", "text"), ("value", "number"),
                ("predicted", "number"), ("error", "fraction"), ("reason", "text")]  # fmt: skip
        views.append(keyed("Components", [(name, kind, name) for name, kind in kept], parts))
    return views


def _state(run: Json) -> str:
    return state_of(run.get("predicted_fits", True), likely(run), str(run.get("predicted_verdict", "")))


def _ends(run: Json) -> dict[str, float | None]:
    return {
        f"{name} {end}": value
        for name, key in _ENDS.items()
        for end, value in zip(("low", "high"), ends(run, key), strict=True)
    }


def runs_in_words(result: Json) -> str:
    """'30 runs of 4 sources': those that were simulated."""
    simulated = [one for one in result["runs"] if one["status"] == "simulated"]
    sources = len({str(one.get("source")) for one in simulated})
    return f"{len(simulated):,} run{'s' * (len(simulated) != 1)} of {sources} source{'s' * (sources != 1)}"


def errors_in_words(result: Json) -> str:
    """What the summary says of each quantity: the mean error over sources, and how many intervals held."""
    said = []
    for title, _, key in _QUANTITIES:
        found = result["summary"].get(key)
        held = (result["summary"].get("coverage") or {}).get(key) or {}
        if found:
            inside = f" ({held['within']} of {held['n']} inside their intervals)" if held.get("n") else ""
            said.append(f"Mean error of {title.lower()} {found['mape']:.1%}{inside}")
    return "\n".join(said) or "Nothing measured to compare with"


def _against(title: str, kind: str, key: str, runs: Sequence[Json]) -> View:
    points = []
    for one in runs:
        measured, predicted = one.get(f"measured_{key}"), one.get(f"predicted_{key}")
        if not measured or not predicted:
            continue
        interval = f"predicted_{key.rpartition('_')[0]}_interval_{key.rpartition('_')[2]}"
        low, high = ends(one, interval)
        rows = [
            ("measured", measured, kind),
            ("predicted", predicted, kind),
            ("error", predicted / measured - 1, "fraction"),
            ("at least", low, kind),
            ("at most", high, kind),
            ("family", one.get("family"), "text"),
            ("GPU", one.get("gpu"), "text"),
        ]
        point = {
            "x": measured, "y": predicted, "name": one["run_id"], "mark": _state(one),
            "yr": one.get(interval), "rows": rows,
        }  # fmt: skip
        points.append((str(one.get("source", "runs")), point))
    x, y = (
        {"name": f"{what} {title.lower()}", "type": kind, "log": True} for what in ("measured", "predicted")
    )
    return plot(f"{title}: predicted against measured", x, y, points, diagonal=True)
