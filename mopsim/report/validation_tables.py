"""Tables of a validation: one content, shown on a terminal or written as Markdown."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mopsim.common.errors import MOST_LINES
from mopsim.common.units import format_bytes, format_probability, format_seconds
from mopsim.intervals.errors import Name
from mopsim.intervals.spread import LEVEL
from mopsim.validate.components import Predicted
from mopsim.validate.output import GROUPS, MEASURES, UNITS, component_errors, selections, worst
from mopsim.validate.run import Validation
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import ErrorSummary, by_group, capacity, over_sources, regrets
from mopsim.validate.uncertain import coverage

FEW = 5
"""Runs up to which each is shown, in the place of means."""


@dataclass
class Grid:
    """A titled table: `left` columns are text, `right` ones numbers."""

    title: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def markdown(self) -> str:
        """The table under a heading."""
        names = (*self.left, *self.right)
        lines = [f"## {self.title[0].upper()}{self.title[1:]}", "", "| " + " | ".join(names) + " |"]
        lines.append("|" + "---|" * len(self.left) + "---:|" * len(self.right))
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def tables(validation: Validation, parts: list[Predicted], level: float = LEVEL) -> list[Grid]:
    """What the user sees: accuracy by hold-out, selection and group, intervals, the worst, capacity, what is
    unsupported, components; of FEW runs each alone. level: of the intervals."""
    found: list[Grid] = []
    if 0 < len(validation.scored) <= FEW:
        found.append(_each(validation, level))
    elif validation.scored:
        found += [_selections(validation), _hold_outs(validation), *_intervals(validation, level)]
        groups = [_groups(validation, group) for group in ("source", "gpu", "family", "precision")]
        found += [table for table in groups if len(table.rows) > 1]
        found += [_worst(validation, level), _verdicts(validation)]
    if validation.refused:
        found.append(_refused(validation))
    if parts:
        found.append(_components(parts))
    return found


def _each(validation: Validation, level: float) -> Grid:
    """A line for each quantity of each run, and whether it fits where nothing of it was measured."""
    names = ("measured", "predicted", f"{level:.0%}", "error")
    table = Grid("predicted and measured", ("run", "quantity"), names)
    shown: tuple[tuple[Name, Callable[[float], str]], ...] = (
        ("step_time", format_seconds), ("peak_memory", format_bytes),
    )  # fmt: skip
    for one in validation.scored:
        for quantity, show in shown:
            if measured := getattr(one.case.measured, quantity):
                predicted = one.predicted(quantity)
                ends = _ends(one.interval(quantity, level), measured, show)
                error = _percent(predicted / measured - 1, True)
                name = quantity.replace("_", " ")
                table.add_row(one.case.id, name, show(measured), show(predicted), ends, error)
        if one.case.measured.fits is not None:
            said = "ran" if one.case.measured.fits else "ran out"
            table.add_row(one.case.id, "P(fits)", said, format_probability(one.p_fits), "", "")
    for quantity, _ in shown:
        table.rows += _together(validation.scored, quantity, level)
    return table


def _together(scored: Sequence[Scored], quantity: Name, level: float) -> list[tuple[str, ...]]:
    """A row of several runs of which the quantity was measured: the mean error, and how many are inside their
    interval."""
    found = [(one, measured) for one in scored if (measured := getattr(one.case.measured, quantity))]
    if len(found) < 2:
        return []
    inside = sum(low <= it <= high for one, it in found for low, high in (one.interval(quantity, level),))
    error = sum(abs(one.predicted(quantity) / measured - 1) for one, measured in found) / len(found)
    name = f"{quantity.replace('_', ' ')}, mean"
    return [(f"{len(found)} runs", name, "", "", f"{inside} of {len(found)} inside", _percent(error))]


def _ends(ends: tuple[float, float], measured: float, show: Callable[[float], str]) -> str:
    """'1 to 2, outside': an interval, and whether it missed what was measured."""
    low, high = ends
    return f"{show(low)} to {show(high)}{'' if low <= measured <= high else ', outside'}"


def _percent(value: float | None, signed: bool = False) -> str:
    return "" if value is None else f"{value:+.1%}" if signed else f"{value:.1%}"


def _cells(found: ErrorSummary | None) -> tuple[str, ...]:
    """Number, mean, bias, 90 %, largest."""
    if found is None:
        return ("", "", "", "", "")
    rest = _percent(found.p90_ape), _percent(found.max_ape)
    return (str(found.n), _percent(found.mape), _percent(found.bias, True), *rest)


def _selections(validation: Validation) -> Grid:
    table = Grid("errors, rows averaged within a source, then sources", ("rows", "quantity"),
                   ("n", "mean", "bias", "90 %", "largest"))  # fmt: skip
    for name, rows in _distinct(validation.scored).items():
        for measure, value in MEASURES.items():
            if found := over_sources(rows, value):
                table.add_row(name, measure, *_cells(found))
    return table


def _distinct(scored: list[Scored]) -> dict[str, list[Scored]]:
    """Selections of runs; those of the same runs as one, by all their names."""
    names: dict[tuple[int, ...], list[str]] = defaultdict(list)
    found = selections(scored)
    for name, rows in found.items():
        names[tuple(map(id, rows))].append(name)
    return {", ".join(same): found[same[0]] for same in names.values()}


def _hold_outs(validation: Validation) -> Grid:
    """Leave one source out, and leave one network out."""
    names = tuple(validation.held)
    columns = [text for name in names for text in (f"{name} out", "bias")]
    table = Grid(
        "errors with the whole source left out, and with the network only",
        ("rows", "quantity"),
        ("n", *columns),
    )
    chosen = {name: _distinct(rows) for name, rows in validation.held.items()}
    for selection in next(iter(chosen.values()), {}):
        for measure in UNITS.values():
            found = [over_sources(chosen[name][selection], MEASURES[measure]) for name in names]
            if found[0] is None:
                continue
            cells = [text for one in found if one for text in (_percent(one.mape), _percent(one.bias, True))]
            table.add_row(selection, measure, str(found[0].n), *cells)
    return table


def _intervals(validation: Validation, level: float) -> list[Grid]:
    """How many intervals hold what was measured, and how wide they are."""
    found = []
    for quantity, unit in UNITS.items():
        held = {name: coverage(rows, quantity, level) for name, rows in validation.held.items()}
        known = {name: one for name, one in held.items() if one is not None}
        if not known:
            continue
        columns = tuple(f"{name} out" for name in known)
        table = Grid(f"{level:.0%} intervals of {unit} that hold, A and B", ("source",), ("runs", *columns))
        first, every = next(iter(known.values())), list(known.values())
        for source, (_, runs) in sorted(first.by_source.items()):
            table.add_row(source, str(runs), *(_percent(one.share_of(source)) for one in every))
        total = str(first.runs)
        table.add_row("all runs", total, *(_percent(one.share) for one in every))
        table.add_row("sources weighing alike", total, *(_percent(one.share_of_sources) for one in every))
        table.add_row("median width over the prediction", total, *(_percent(one.width) for one in every))
        found.append(table)
    return found


def _groups(validation: Validation, group: str) -> Grid:
    names = ("calibrated", "bias", "uncalibrated", "memory")
    table = Grid(f"mean errors by {group}, all rows", (group,), ("n", *names))
    found = {name: by_group(validation.scored, value, GROUPS[group]) for name, value in MEASURES.items()}
    for key in sorted({GROUPS[group](one) for one in validation.scored}):
        step, alone, memory = (
            _cells(found[name].get(key))
            for name in ("step_time_s", "step_time_s_uncalibrated", "peak_memory_bytes")
        )
        table.add_row(key, *step[:3], alone[1], memory[1])
    return table


def _worst(validation: Validation, level: float) -> Grid:
    names = ("measured s", "predicted s", f"{level:.0%}", "error")
    table = Grid("the ten largest errors of step time", ("run",), names)
    for one in worst(validation.scored, 10):
        measured = one.case.measured.step_time or 0.0
        ends = _ends(one.interval("step_time", level), measured, "{:.3g}".format)
        table.add_row(
            one.case.id, f"{measured:.3f}", f"{one.calibrated:.3f}", ends, _percent(one.step_error, True)
        )
    return table


def _verdicts(validation: Validation) -> Grid:
    table = Grid("capacity and choice", ("what",), ("n", "right"))
    fits, jobs = capacity(validation.scored), regrets(validation.scored)
    table.add_row("ran, P(fits) above 0.5", str(fits.ran), str(fits.ran_right))
    table.add_row("ran out, predicted to, or P(fits) at most 0.5", str(fits.ran_out), str(fits.ran_out_right))
    for what, slower in (
        ("jobs with a choice of strategy; mean slowdown of ours", [job.slowdown for job in jobs]),
        ("the same, chosen by the profile alone (uncalibrated)", [job.uncalibrated for job in jobs]),
    ):
        mean = sum(slower) / len(slower) if slower else None
        table.add_row(what, str(len(jobs)), _percent(mean))
    return table


def _refused(validation: Validation) -> Grid:
    complaints = (said for one in validation.refused for said in one.complaints)
    counts = Counter((name, reason) for name, reason in complaints)
    rows = len(validation.refused)
    table = Grid(f"{rows} row{'s' * (rows > 1)} unsupported", ("field", "reason"), ("rows",))
    for (name, reason), count in counts.most_common(MOST_LINES):
        table.add_row(name, reason, str(count))
    if len(counts) > MOST_LINES:
        table.add_row("", f"and {len(counts) - MOST_LINES:,} more", "")
    return table


def _components(parts: list[Predicted]) -> Grid:
    title = "components: errors of those predicted, of all; *: the profiles are fitted to these"
    table = Grid(title, ("component", "metric"), ("n", "mean", "bias", "most"))
    found: dict[str, dict[str, dict[str, Any]]] = component_errors(parts)
    for kind, metrics in found.items():
        for metric, entry in metrics.items():
            name = kind + "*" * entry["in_sample"]
            mean, most = _percent(entry.get("mape")), _percent(entry.get("max_ape"))
            bias = _percent(entry.get("bias"), True)
            table.add_row(name, metric, f"{entry['n']}/{entry['rows']}", mean, bias, most)
    return table
