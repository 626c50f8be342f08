"""The CSVs of measurements: columns checked, numbers parsed with the cell named when they are none."""

from pathlib import Path

from mopsim.common.errors import MopError, SpecError, require_name, shown
from mopsim.common.rules import UNKNOWN as UNKNOWN
from mopsim.common.table import Row as Row
from mopsim.common.table import read_table
from mopsim.validate.columns import COMPONENTS, RUNS, needed

LARGEST = 1e18
"""No measurement and no size is larger, in any of the units of the tables."""


class UnsupportedError(Exception):
    """A row that cannot be simulated or predicted: the field, and what about it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


def read_runs(path: Path) -> list[Row]:
    """Rows of a runs CSV; one with too many cells has SURPLUS. Raises MopError where a run_id is empty or
    repeats."""
    rows = _some(read_table(path, needed(RUNS), "runs", surplus=True), f"runs: {path}")
    seen: set[str] = set()
    for row in rows:
        if not row["run_id"]:
            raise MopError(f"runs: {path}: a row has no run_id")
        try:
            require_name(row["run_id"], "run_id")
        except SpecError as error:
            raise MopError(f"runs: {path}: {error}") from None
        if row["run_id"] in seen:
            raise MopError(f"runs: {path}: run_id {row['run_id']!r} appears twice")
        seen.add(row["run_id"])
    return rows


def read_components(path: Path) -> list[Row]:
    """Rows of a components CSV."""
    return _some(read_table(path, needed(COMPONENTS), "components"), f"components: {path}")


def _some(rows: list[Row], where: str) -> list[Row]:
    if not rows:
        raise MopError(f"{where}: has no row below its header")
    return rows


def number(row: Row, column: str) -> float | None:
    """The cell as a number of at least 0, None where it is empty or unknown. Raises MopError where it is
    neither."""
    text = row.get(column, "")
    return None if text in UNKNOWN else parse_number(text, f"{row.get('run_id', 'row')}: {column}")


def parse_number(text: str, where: str) -> float:
    """A number from 0 to LARGEST. Raises MopError naming `where`."""
    try:
        value = float(text)
    except ValueError:
        raise MopError(f"{where}: {shown(text)} is not a number") from None
    if not 0 <= value <= LARGEST:
        raise MopError(f"{where}: {shown(text)} must be from 0 to {LARGEST:g}")
    return value


def positive(value: float | None, where: str, cell: object) -> float | None:
    """A measured number, None where none is. Raises MopError naming `where` where it is 0."""
    if value == 0:
        raise MopError(f"{where}: {shown(cell)} must be above 0: leave it empty where nothing was measured")
    return value


def whole(value: float, where: str, cell: object) -> int:
    """A number as a count. Raises MopError naming `where` where it is not positive and whole."""
    if value != int(value) or value < 1:
        raise MopError(f"{where}: {shown(cell)} is not a positive whole number")
    return int(value)


def count(row: Row, column: str) -> int | None:
    """The cell as a positive whole number, None where it is empty. Raises MopError where it is neither."""
    value = number(row, column)
    return None if value is None else whole(value, f"{row.get('run_id', 'row')}: {column}", row[column])
