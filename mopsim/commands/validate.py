"""`mopsim validate`: predicted against measured, for cases, or for the rows of a user's tables."""

from pathlib import Path

from msgspec.structs import replace

from mopsim.commands.console import human, say_written
from mopsim.commands.progress import progress
from mopsim.commands.sealed import run as score_sealed
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs, whole_directory
from mopsim.intervals import check_level
from mopsim.report.formats import read_formats, saved_as
from mopsim.report.terminal import table
from mopsim.report.validation_tables import tables
from mopsim.spec.stacks import load_stack
from mopsim.validate.calibration import HoldOut
from mopsim.validate.case import Case, read_cases
from mopsim.validate.components import predict_components
from mopsim.validate.models import read_rows
from mopsim.validate.output import to_json
from mopsim.validate.run import Refused, cases_of, validate
from mopsim.validate.tables import read_components, read_runs

LEGEND = (
    "A, B, C: how fully a source states its runs, C is not judged. bias: mean of the signed errors. 90 %: of "
    "the errors are smaller. source out, model out: predicted without the runs of its source, its network."
)


def run(
    *, runs: str | None, models: str | None, components: str | None, cases: list[str] | None,
    stack: str | None, out: str | None, formats: str, jobs: int, hold_out: HoldOut, interval: float,
    sealed: str | None, measurements: str | None, json: str | None,
) -> None:  # fmt: skip
    """Read, simulate, score, show; write tables, a figure and JSON where asked to."""
    if sealed:
        score_sealed(sealed, measurements, json)
        return
    if not runs and not components and not cases:
        raise MopError("--runs: not given, and no --cases or --components: one of them is needed")
    check_level(interval, "--interval")
    check_outputs({"--json": json}, {"--out": out})
    console, kinds = human(json), read_formats(formats)
    known, refused = _cases(runs, models, cases or [], stack)
    with progress(console, "simulating", None) as shown:
        validation = validate(
            known, jobs, lambda n, of: shown(n, f"simulated {n} of {of}"), hold_out, refused
        )
    parts = predict_components(read_components(Path(components))) if components else []
    grids = tables(validation, parts, interval)
    for grid in grids:
        console.print(table(grid.title, grid.left, grid.right, grid.rows))
    console.print(LEGEND, style="dim")
    written: list[str] = []
    if out:
        from mopsim.report.validation import figures

        with whole_directory(Path(out)) as aside, saved_as(kinds):
            figures(aside, validation, interval)
            io.write_text(aside / "tables.md", "\n".join(grid.markdown() for grid in grids))
            written = [str(Path(out) / path.name) for path in sorted(aside.iterdir())]
    if json:
        io.write_json(json, to_json(validation, parts, interval))
    say_written(console, json, *written)


def _cases(
    runs: str | None, models: str | None, files: list[str], stack: str | None
) -> tuple[list[Case], list[Refused]]:
    """The cases of the files, and those of the rows; with the rows that are none. stack: of all of them, if
    it is given."""
    known = [case for one in files for case in read_cases(Path(one))]
    if stack:
        load_stack(stack, "--stack")
        known = [_under(case, stack) for case in known]
    if not runs:
        return known, []
    rows = [{**row, "stack": stack or row.get("stack", "")} for row in read_runs(Path(runs))]
    found, refused = cases_of(rows, read_rows(Path(models)) if models else {})
    return known + found, refused


def _under(case: Case, stack: str) -> Case:
    """The same run by other software."""
    return replace(case, strategy=replace(case.strategy, stack=stack), stack_changes={})
