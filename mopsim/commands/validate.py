"""`mopsim validate`: predicted against measured, for the user's own CSVs or for published ones."""

from pathlib import Path

from rich.table import Table

from mopsim.commands.console import human
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs
from mopsim.report.terminal import table
from mopsim.report.validation_tables import Grid, tables
from mopsim.spec.model_table import read_rows
from mopsim.validate.components import predict_components
from mopsim.validate.misses import markdown, missed_json, misses
from mopsim.validate.output import to_json
from mopsim.validate.run import Validation, validate_runs
from mopsim.validate.tables import read_components, read_runs


def run(
    runs: str | None, models: str | None, components: str | None, out: str | None, jobs: int, json: str | None
) -> None:
    """Read, simulate, score, show; write figures and JSON where asked to."""
    if not runs and not components:
        raise MopError("--runs: not given, and no --components: one of them is needed")
    read = {"--runs": runs, "--models": models, "--components": components}
    check_outputs({"--json": json}, {"--out": out}, inputs=read)
    console = human(json)
    validation = Validation([])
    if runs:
        networks = read_rows(Path(models)) if models else {}
        with progress(console, "simulating", None) as shown:
            rows = read_runs(Path(runs))
            validation = validate_runs(rows, networks, jobs, lambda n, of: shown(n, f"simulated {n} of {of}"))
    parts = predict_components(read_components(Path(components))) if components else []
    grids, missed = tables(validation, parts), misses(validation, parts)
    for grid in grids:
        console.print(_shown(grid))
    if out:
        from mopsim.report.validation import figures

        for path in figures(Path(out), validation, parts):
            console.print(f"written {path}")
        io.write_text(Path(out) / "misses.md", markdown(missed))
        io.write_text(Path(out) / "tables.md", "\n".join(grid.markdown() for grid in grids))
    if json:
        io.write_json(json, to_json(validation, parts) | missed_json(missed))


def _shown(grid: Grid) -> Table:
    found = table(grid.title, grid.left, grid.right)
    for row in grid.rows:
        found.add_row(*row)
    return found
