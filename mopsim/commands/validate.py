"""`mopsim validate`: predicted against measured, for cases, or for the rows of a user's tables."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import mopsim
from mopsim.commands.console import human, say_written
from mopsim.commands.progress import progress
from mopsim.commands.sealed import run as score_sealed
from mopsim.common import io
from mopsim.common.command_line import as_typed
from mopsim.common.errors import MOST_LINES, MistakesError, MopError, one_line, refuse, told
from mopsim.common.outputs import check_outputs, say, whole_directory
from mopsim.common.table import cut
from mopsim.intervals.spread import check_level
from mopsim.report.formats import read_formats, saved_as
from mopsim.report.terminal import table
from mopsim.report.validation_tables import FEW, tables
from mopsim.spec.stacks import load_stack
from mopsim.validate.calibration import HoldOut
from mopsim.validate.case import Case, read_cases
from mopsim.validate.columns import COMPONENTS, MODELS, RUNS, Column
from mopsim.validate.components import Predicted, predict_components
from mopsim.validate.models import read_rows
from mopsim.validate.output import to_json
from mopsim.validate.run import Refused, cases_of, validate
from mopsim.validate.tables import Row, read_components, read_runs, unread

NOTHING_PREDICTED = 3
"""Exit code where every row is refused."""
LEGEND = (
    "A, B, C: how fully a source states its runs, C is not judged. bias: mean of the signed errors. 90 %: of "
    "the errors are smaller. source out, model out: predicted without the runs of its source, its network."
)


def run(
    *, runs: str | None, models: str | None, components: str | None, cases: list[str] | None,
    stack: str | None, out: str | None, formats: str, jobs: int, hold_out: HoldOut, interval: float,
    sealed: str | None, measurements: str | None, json: str | None,
) -> int:  # fmt: skip
    """Read, simulate, score, show; write tables, a figure and JSON where asked to. Returns the exit code: 3
    where nothing could be predicted."""
    if sealed:
        score_sealed(sealed, measurements, json)
        return 0
    if not runs and not components and not cases:
        raise MopError("--runs: not given, and no --cases or --components: one of them is needed")
    check_level(interval, "--interval")
    check_outputs({"--json": json}, {"--out": out})
    console, kinds = human(json), read_formats(formats)
    rows, networks, pieces = _tables(runs, models, components, console)
    known, refused = _cases(rows, networks, cases or [], stack)
    with progress(console, "simulating", None) as shown:
        validation = validate(
            known, jobs, lambda n, of: shown(n, f"simulated {n} of {of}"), hold_out, refused
        )
    parts = predict_components(pieces)
    grids = tables(validation, parts, interval)
    predicted = bool(validation.scored or any(one.predicted is not None for one in parts))
    reasons = [] if predicted else _reasons(validation.refused, parts)
    for grid in grids if predicted or len(reasons) > MOST_LINES else []:  # else the reasons say all of it
        console.print(table(grid.title, grid.left, grid.right, grid.rows))
    if len(validation.scored) > FEW:
        console.print(LEGEND, style="dim")
    written: list[str] = []
    made = {"facts": {"command": as_typed("mopsim"), "held out": hold_out, "version": mopsim.__version__}}
    with io.json_beside(json, to_json(validation, parts, interval) | made if json else None):
        if out:
            from mopsim.report.validation import figures

            with whole_directory(Path(out)) as aside, saved_as(kinds):
                figures(aside, validation, interval)
                io.write_text(aside / "tables.md", "\n".join(grid.markdown() for grid in grids))
                written = [str(Path(out) / path.name) for path in sorted(aside.iterdir())]
    say_written(console, json, *written)
    for line in told(reasons):
        say(one_line(f"mopsim: {line}"), stderr=True)
    return 0 if predicted else NOTHING_PREDICTED


def _reasons(refused: Sequence[Refused], parts: Sequence[Predicted]) -> list[str]:
    """A line for all that is wrong of each row, the first with what became of them."""
    lines = [(one.about["run_id"], said) for one in refused for said in one.told]
    lines += [
        (one.component.kind, f"{field}: {reason.removeprefix(f'{field}: ')}")
        for one in parts
        for field, reason in ((one.field, one.reason), *one.more)
    ]
    count = len(refused) + len(parts)
    rows = "the only row" if count == 1 else f"all {count:,} rows, the first"
    others = [f"{name}: {said}" if count > 1 else said for name, said in lines[1:]]
    return [f"nothing is predicted: refused {rows}: {lines[0][1]}", *others]


def _told(
    path: str, columns: Mapping[str, Column], read: Callable[[Path], list[Row]], console: Any
) -> list[Row]:
    """The rows of a table; its columns that are not read are told."""
    rows = read(Path(path))
    if names := unread(next(iter(rows), {}), columns):
        console.print(cut(f"note: {path}: not read: {', '.join(names)}", 4000), style="yellow")
    return rows


def _tables(
    runs: str | None, models: str | None, components: str | None, console: Any
) -> tuple[list[Row], list[Row], list[Row]]:
    """The rows of each table, none of one that is not given. Raises MopError with what is wrong of any."""
    wrong: list[str] = []

    def read(path: str | None, columns: Mapping[str, Column], by: Callable[[Path], list[Row]]) -> list[Row]:
        try:
            return _told(path, columns, by, console) if path else []
        except MopError as error:
            wrong.extend(error.lines if isinstance(error, MistakesError) else [str(error)])
            return []

    found = (
        read(runs, RUNS, read_runs),
        read(models if runs else None, MODELS, lambda path: [*read_rows(path).values()]),
        read(components, COMPONENTS, read_components),
    )
    refuse(wrong)
    return found


def _cases(
    rows: list[Row], networks: list[Row], files: list[str], stack: str | None
) -> tuple[list[Case], list[Refused]]:
    """The cases of the files, and those of the rows; with the rows that are none. stack: of all of them, if
    it is given."""
    known = [case for one in files for case in read_cases(Path(one))]
    if stack:
        load_stack(stack, "--stack")
        known = [replace(one, strategy=replace(one.strategy, stack=stack), stack_changes={}) for one in known]
    rows = [{**row, "stack": stack or row.get("stack", "")} for row in rows]
    found, refused = cases_of(rows, {one["model"]: one for one in networks})
    return known + found, refused
