"""`mopsim validate`: predicted against measured, for the user's own CSVs or for published ones."""

from pathlib import Path
from typing import Any

from rich.table import Table

from mopsim.commands.inputs import human
from mopsim.spec import io
from mopsim.spec.errors import MopError
from mopsim.spec.model_table import read_rows
from mopsim.validate.components import Predicted, predict_components
from mopsim.validate.output import GROUPS, MEASURES, component_errors, selections, to_json, worst
from mopsim.validate.run import Validation, validate_runs
from mopsim.validate.scoring import Errors, by_group, capacity, over_sources, regrets
from mopsim.validate.tables import read_components, read_runs


def run(
    runs: str | None, models: str | None, components: str | None, out: str | None, jobs: int, json: str | None
) -> None:
    """Read, simulate, score, show; write figures and JSON where asked to."""
    if not runs and not components:
        raise MopError("runs: give --runs, --components or both")
    console = human(json)
    validation = Validation([])
    if runs:
        table = read_rows(Path(models)) if models else {}
        with console.status("simulating") as status:
            validation = validate_runs(
                read_runs(Path(runs)), table, jobs, lambda n, all_: status.update(f"simulated {n} of {all_}")
            )
    parts = predict_components(read_components(Path(components))) if components else []
    for one in tables(validation, parts):
        console.print(one)
    if out:
        from mopsim.report.validation import figures

        for path in figures(Path(out), validation, parts):
            console.print(f"written {path}")
    if json:
        io.write_json(json, to_json(validation, parts))


def tables(validation: Validation, parts: list[Predicted]) -> list[Table]:
    """What the user sees: accuracy by selection and group, the worst, capacity, what is unsupported,
    components."""
    found: list[Table] = []
    if validation.scored:
        found.append(_selections(validation))
        found += [_groups(validation, group) for group in ("source", "gpu", "family", "precision")]
        found += [_worst(validation), _verdicts(validation)]
    if validation.refused:
        found.append(_refused(validation))
    if parts:
        found.append(_components(parts))
    return found


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _percent(value: float | None, signed: bool = False) -> str:
    return "" if value is None else f"{value:+.1%}" if signed else f"{value:.1%}"


def _cells(found: Errors | None) -> tuple[str, ...]:
    if found is None:
        return ("", "", "", "", "")
    return (
        str(found.n),
        _percent(found.mape),
        _percent(found.bias, True),
        _percent(found.p90),
        _percent(found.max_ape),
    )


def _selections(validation: Validation) -> Table:
    table = _table("errors, rows averaged within a source, then sources", ("rows", "quantity"),
                   ("n", "mean", "bias", "90 %", "largest"))  # fmt: skip
    for name, rows in selections(validation.scored).items():
        for measure, value in MEASURES.items():
            table.add_row(name, measure, *_cells(over_sources(rows, value)))
    return table


def _groups(validation: Validation, group: str) -> Table:
    names = ("calibrated", "bias", "uncalibrated", "regression", "memory")
    table = _table(f"mean errors by {group}, all rows", (group,), ("n", *names))
    found = {name: by_group(validation.scored, value, GROUPS[group]) for name, value in MEASURES.items()}
    step = found["step_time_s"]
    for key in sorted({GROUPS[group](one) for one in validation.scored}):
        cells: list[str] = [str(step[key].n) if key in step else ""]
        cells.append(_percent(step[key].mape) if key in step else "")
        cells.append(_percent(step[key].bias, True) if key in step else "")
        for name in ("step_time_s_uncalibrated", "step_time_s_regression", "peak_memory_bytes"):
            cells.append(_percent(found[name][key].mape) if key in found[name] else "")
        table.add_row(key, *cells)
    return table


def _worst(validation: Validation) -> Table:
    table = _table("the ten largest errors of step time", ("run",), ("measured s", "predicted s", "error"))
    for one in worst(validation.scored, 10):
        measured = one.case.step_time or 0.0
        table.add_row(
            one.case.row["run_id"], f"{measured:.3f}", f"{one.calibrated:.3f}", _percent(one.step_error, True)
        )
    return table


def _verdicts(validation: Validation) -> Table:
    table = _table("capacity and choice", ("what",), ("n", "right"))
    fits, jobs = capacity(validation.scored), regrets(validation.scored)
    table.add_row("ran, predicted to fit", str(fits.ran), str(fits.ran_right))
    table.add_row("ran out, predicted to", str(fits.ran_out), str(fits.ran_out_right))
    mean = sum(job.slowdown for job in jobs) / len(jobs) if jobs else None
    table.add_row("jobs with a choice of strategy; mean slowdown of ours", str(len(jobs)), _percent(mean))
    return table


def _refused(validation: Validation) -> Table:
    counts: dict[tuple[str, str], int] = {}
    for one in validation.refused:
        reason = one.reason if one.field != "simulator" else one.reason[:90]
        key = (one.field, reason)
        counts[key] = counts.get(key, 0) + 1
    table = _table(f"{len(validation.refused)} rows unsupported", ("field", "reason"), ("rows",))
    for (field, reason), count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(field, reason, str(count))
    return table


def _components(parts: list[Predicted]) -> Table:
    table = _table(
        "components", ("component", "metric", ""), ("rows", "predicted", "mean", "bias", "largest")
    )
    found: dict[str, dict[str, dict[str, Any]]] = component_errors(parts)
    for kind, metrics in found.items():
        for metric, entry in metrics.items():
            note = "fitted to these" if entry["in_sample"] else ""
            errors = (
                _percent(entry.get("mape")),
                _percent(entry.get("bias"), True),
                _percent(entry.get("max_ape")),
            )
            table.add_row(kind, metric, note, str(entry["rows"]), str(entry["n"]), *errors)
    return table
