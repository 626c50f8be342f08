"""Views of simulated steps: a table, time against memory, bars, a timeline. A step is JSON of `simulate`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from mopsim.common.errors import MopError
from mopsim.common.io import convert
from mopsim.engine import SimResult
from mopsim.intervals.spread import OUT, SURE, fitting_in_words
from mopsim.report.alternatives import freedom
from mopsim.report.explore.page import View
from mopsim.report.lanes import explained, lane, lanes
from mopsim.report.palette import in_order
from mopsim.report.tables import DRY_RUN, ENOUGH, NO_STRATEGY, P_FITS, ROUTED, describe, rate
from mopsim.search.result import Left, promise, promises
from mopsim.spec.categories import shown_as
from mopsim.spec.strategy import Strategy

Json = Mapping[str, Any]
Cell = str | float | None
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Amounts = dict[str, Amount]
Ends = tuple[Amount, Amount] | None


class StepJson(msgspec.Struct, frozen=True, kw_only=True):
    """What a page reads of a step's JSON, whose other keys it does not: seconds, bytes, tokens per second."""

    strategy: dict[str, Any] | str
    fits: bool
    step_time_s: Annotated[float, msgspec.Meta(gt=0)]
    tokens_per_s_per_device: Amount
    mfu: Amount
    peak_memory_bytes: Amount
    memory_limit_bytes: Amount
    exposed_s: Amounts
    busy_s: Amounts = {}
    time_by_component_s: Amounts = {}
    memory_by_category_bytes: Amounts = {}
    step_time_interval_s: Ends = None
    peak_memory_interval_bytes: Ends = None
    peak_memory_upper_bytes: Amount | None = None
    host_memory_bytes: Amount | None = None
    verdict: str | None = None
    p_fits: Share | None = None
    p_fits_as_described: Share | None = None
    p_best_is_faster: Share | None = None
    interval: Share = 0.9
    gap: Amount | None = None
    expected_gap: Amount | None = None
    provenance: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExplorerStep:
    """A simulated step and what it is called in the result."""

    label: str
    found: Json

    @property
    def plan(self) -> str:
        """The strategy in a line."""
        return plan_of(self.found["strategy"])

    @property
    def state(self) -> str:
        """'fits', 'may not fit' (it fits, but not surely) or 'out of memory'."""
        return state_of(bool(self.found["fits"]), likely(self.found), self.verdict)

    @property
    def verdict(self) -> str:
        return str(self.found.get("verdict") or ("fits" if self.found["fits"] else OUT))


def device(found: Json) -> str:
    """What a device of a step, or of a case, is called; files of before say no such thing."""
    return str(found.get("each", "GPU"))


def likely(found: Json) -> float | None:
    """The probability by which what fits is marked, in a file that has it."""
    odds: float | None = found.get("p_fits_as_described", found.get("p_fits"))
    return odds


def state_of(fits: bool, p_fits: float | None, verdict: str = "") -> str:
    """How a row or a point is marked. p_fits: `likely`."""
    if p_fits is None:  # a file of before
        p_fits = 0.0 if verdict in ("may not fit", "at risk") else SURE
    return fitting_in_words(fits, p_fits)


def plan_of(strategy: Json | str) -> str:
    """A strategy of a file in a line; its name where the file has fields that this version does not."""
    if isinstance(strategy, str):
        return strategy
    try:
        return describe(convert(dict(strategy), Strategy, "strategy"))
    except MopError:
        return str(strategy.get("name", "strategy"))


def proof(found: Json) -> str:
    """What its search says of the plans that it left out; nothing where none was made."""
    return promise(*_left(found)) if "gap" in found else ""


def proofs(searched: Sequence[tuple[str, Json]]) -> str:
    """The same of several searches, by label."""
    made = [(label, _left(found)) for label, found in searched if "gap" in found]
    return " ".join(f"{said}." for said in promises(made))


def _left(found: Json) -> Left:
    return found["gap"], found.get("expected_gap")


def as_fast(found: Json) -> str:
    """What of a plan may be otherwise and makes no difference to the step."""
    return freedom(found["strategy"], found.get("as_fast") or {}, found.get("as_fast_together") or [])


def exposed(found: Json) -> float:
    """Share of the step in which compute waits for communication, copies or the host."""
    return float(sum(found["exposed_s"].values()) / found["step_time_s"])


def ends(found: Json, key: str) -> tuple[float | None, float | None]:
    """The ends of an interval; None where the result has none."""
    low, high = found.get(key) or (None, None)
    return low, high


COLUMNS: tuple[tuple[str, str, Any], ...] = (
    ("label", "text", lambda one: one.label),
    ("verdict", "text", lambda one: one.state),
    ("P(fits)", "probability", lambda one: one.found.get("p_fits")),
    ("step", "seconds", lambda one: one.found["step_time_s"]),
    ("step at least", "seconds", lambda one: ends(one.found, "step_time_interval_s")[0]),
    ("step at most", "seconds", lambda one: ends(one.found, "step_time_interval_s")[1]),
    (rate(()), "number", lambda one: one.found["tokens_per_s_per_device"]),
    ("strategy", "text", lambda one: one.plan),
    ("MFU", "fraction", lambda one: one.found["mfu"]),
    ("exposed", "fraction", lambda one: exposed(one.found)),
    ("memory", "bytes", lambda one: one.found["peak_memory_bytes"]),
    (ENOUGH, "bytes", lambda one: one.found.get("peak_memory_upper_bytes")),
    ("limit", "bytes", lambda one: one.found["memory_limit_bytes"]),
    ("host", "bytes", lambda one: one.found.get("host_memory_bytes")),
    ("P(best is faster)", "probability", lambda one: one.found.get("p_best_is_faster")),
    ("gap", "fraction", lambda one: one.found.get("gap")),
    ("expected gap", "fraction", lambda one: one.found.get("expected_gap")),
    ("mopexec runs it", "text", lambda one: {True: "yes", False: "no"}.get(one.found.get("runnable"))),
    ("stack", "text", lambda one: one.found.get("stack")),
    ("as fast with", "text", lambda one: as_fast(one.found)),
)
"""Name, type, and what a step has of it; the name of the throughput is of the steps' devices."""


def table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], note: str = "",
          marks: Sequence[str] = ()) -> View:  # fmt: skip
    """Columns (name, type) without those that no row fills. marks: a state for each row."""
    kept = [place for place in range(len(columns)) if any(row[place] not in (None, "") for row in rows)]
    return {
        "kind": "table", "title": title, "note": note, "marks": list(marks),
        "columns": [{"name": columns[place][0], "type": columns[place][1]} for place in kept],
        "rows": [[row[place] for place in kept] for row in rows],
    }  # fmt: skip


NOTE = (
    f"memory: the peak of tensors. {ENOUGH}: this much is enough, with that probability, for tensors and for "
    f"what the allocator and the communicators may add. {P_FITS}."
)


def step_table(
    title: str, steps: Sequence[ExplorerStep], note: str = "", refused: Mapping[str, str] | None = None
) -> View:
    """A row for each step. refused: why further labels have none."""
    rows: list[list[Cell]] = [[get(one) for _, _, get in COLUMNS] for one in steps]
    marks = [one.state for one in steps]
    for label, why in (refused or {}).items():
        said = {"label": label, "verdict": NO_STRATEGY, "strategy": why}
        rows.append([said.get(name) for name, _, _ in COLUMNS])
        marks.append(OUT)
    levels = sorted({one.found["interval"] for one in steps if "interval" in one.found})
    between = [
        f"step at least, at most: a measured step lies between them with {level:.0%}{ROUTED}."
        for level in levels
    ]
    per = rate(device(one.found) for one in steps)
    columns = [(per if name == rate(()) else name, kind) for name, kind, _ in COLUMNS]
    played = [one.label for one in steps if one.found.get("peak_memory_interval_against") == "dry run"]
    only = f"memory of {', '.join(played)}: {DRY_RUN}." if played else ""
    return table(title, columns, rows, " ".join(filter(None, (note, *between, NOTE, only))), marks)


OF_A_POINT = (
    "strategy", "verdict", "step", "step at least", "step at most", rate(()), "MFU", "exposed", "memory",
    ENOUGH, "P(fits)",
)  # fmt: skip


def told(step: ExplorerStep) -> list[tuple[str, Cell, str]]:
    """What a point says of itself."""
    names = {
        "strategy": "plan", "step at least": "at least", "step at most": "at most",
        rate(()): rate([device(step.found)]),
    }  # fmt: skip
    return [(names.get(name, name), get(step), kind) for name, kind, get in COLUMNS if name in OF_A_POINT]


def plot(
    title: str, x: View, y: View, points: Iterable[tuple[str, View]], *, line: bool = False, **more: Any
) -> View:
    """points: (series, point). x, y: axes. line: through the points of a series. more: of a plot."""
    series: dict[str, list[View]] = {}
    for name, point in points:
        series.setdefault(name, []).append(point)
    found = [{"name": name, "line": line, "points": those} for name, those in series.items()]
    return {"kind": "plot", "title": title, "x": x, "y": y, "series": found, **more}


def keyed(
    title: str, columns: Sequence[tuple[str, str, str]], things: Sequence[Json], note: str = "",
    marks: Sequence[str] = (),
) -> View:  # fmt: skip
    """A table of things. columns: name, type, and key of a thing."""
    rows = [[_plain(one.get(key)) for _, _, key in columns] for one in things]
    return table(title, [(name, kind) for name, kind, _ in columns], rows, note, marks)


def _plain(value: Any) -> Cell:
    return value if value is None or isinstance(value, int | float | str) else str(value)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats in both (smaller is better)."""
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def pareto(steps: Sequence[ExplorerStep]) -> View:
    """Step time against memory, the front among those that fit."""
    best = iter(front([_at(one) for one in steps if one.found["fits"]]))
    points = []
    for one in steps:
        x, y = _at(one)
        point = {
            "x": x, "y": y, "mark": one.state, "name": one.label, "rows": told(one),
            "xr": one.found.get("step_time_interval_s"), "yr": one.found.get("peak_memory_interval_bytes"),
            "front": bool(one.found["fits"] and next(best)),
        }  # fmt: skip
        points.append((str(one.found["strategy"].get("name", one.label)), point))
    limits = {one.found["memory_limit_bytes"] for one in steps}
    largest = max(_at(one)[1] for one in steps)
    return plot(
        "Step time against memory",
        {"name": "step time", "type": "seconds"},
        {"name": "device memory at the peak", "type": "bytes", "zero": True},
        points,
        limits=[{"value": one, "name": "limit"} for one in limits if one < 3 * largest],
    )


def _at(step: ExplorerStep) -> tuple[float, float]:
    return float(step.found["step_time_s"]), float(step.found["peak_memory_bytes"])


MOST_BARS = 12


def bars(steps: Sequence[ExplorerStep]) -> list[View]:
    """Memory of the peak by category, time by component, and what is exposed, of the first steps."""
    shown = steps[:MOST_BARS]
    limits = {one.found["memory_limit_bytes"] for one in shown}
    least = min(limits)
    near = len(limits) == 1 and least < 3 * max(one.found["peak_memory_bytes"] for one in shown)
    kinds = (
        (
            "memory",
            "Memory at the peak by category",
            "bytes",
            "memory_by_category_bytes",
            least if near else None,
        ),
        ("components", "Step time by component", "seconds", "time_by_component_s", None),
        ("waits", "Exposed time by what compute waits for", "seconds", "exposed_s", None),
    )
    return [
        {
            "kind": "bars", "space": space, "title": title, "type": unit, "limit": limit,
            "rows": [
                {
                    "name": one.label, "parts": shown_as(one.found[key]),
                    "note": one.state if unit == "bytes" else "",
                }
                for one in shown
            ],
        }
        for space, title, unit, key, limit in kinds
        if any(sum(one.found[key].values()) > 0 for one in shown)
    ]  # fmt: skip


def _short(seconds: float) -> float:
    """Seconds to a part in a million: a page holds thousands."""
    return float(f"{seconds:.6g}")


def timeline(label: str, result: SimResult) -> View:
    """Spans and memory of a step that was simulated with its timeline."""
    streams = lanes(span.stream for span in result.spans)
    names: dict[str, int] = {}
    components = in_order(span.drawn_as for span in result.spans)
    phases: dict[str, int] = {}
    spans = [
        [
            streams.index(one.stream), _short(one.start), _short(one.end),
            names.setdefault(one.name, len(names)),
            components.index(one.drawn_as), phases.setdefault(one.phase, len(phases)),
            one.microbatch, one.layer,
        ]
        for one in result.spans
    ]  # fmt: skip
    drawn, total = result.drawn_microbatches, result.training.num_microbatches(result.strategy)
    stages = result.strategy.pipeline.pipeline_parallel
    said = [
        f"{drawn} of {total} microbatches are drawn" if drawn < total else "",
        f"streams of stage {result.span_stage + 1}, memory of stage {result.memory_stage + 1} of {stages}"
        if stages > 1 else "",
        explained(streams),
    ]  # fmt: skip
    near = result.memory_limit < 3 * result.peak_memory
    return {
        "kind": "timeline", "title": f"Timeline of {label}", "note": "; ".join(filter(None, said)),
        "streams": [lane(one) for one in streams], "names": list(names),
        "components": components, "phases": list(phases),
        "spans": spans, "end": max((one.end for one in result.spans), default=result.step_time),
        "limit": result.memory_limit if near else None,
        "memory": {
            "times": [_short(time) for time, _ in result.memory_curve],
            "categories": {k: v for k, v in result.memory_curve_by_category.items() if any(v)},
        },
    }  # fmt: skip
