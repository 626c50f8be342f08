"""The CSVs of measurements: columns checked, cells held to what their column may say, numbers parsed."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mopsim.common.errors import MopError, SpecError, refuse, require, require_name
from mopsim.common.explain import not_one_of
from mopsim.common.nearest import misspelt
from mopsim.common.rules import UNKNOWN as UNKNOWN
from mopsim.common.table import SURPLUS, Line, read_table
from mopsim.common.table import Row as Row
from mopsim.common.values import parse_float
from mopsim.spec import documents
from mopsim.validate.columns import COMPONENTS, NAMES, NEEDED, ROOTS, RUNS, Column, needed

LEAST, LARGEST = 1e-12, 1e18
"""No measurement and no size is smaller (but 0) or larger, in any of the units of the tables."""

LIKE_NEEDED = 0.7
"""Likeness from which a column is taken for one that is missing and that all rows need: tpp for tp,
recomputation for recompute."""

_TOO_MANY = "has more cells than the header"


class UnsupportedError(Exception):
    """A row that cannot be simulated or predicted: the field, and what about it. more: other fields of the
    row with what is wrong of them."""

    def __init__(self, field: str, reason: str, more: Sequence["UnsupportedError"] = ()) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason, self.more = field, reason, tuple(more)

    @property
    def each(self) -> list["UnsupportedError"]:
        """This one and those beside it, each alone."""
        return [UnsupportedError(self.field, self.reason), *self.more]

    @property
    def complaints(self) -> list[tuple[str, str]]:
        """(field, reason) of each, the field not again in the reason."""
        return [(one.field, one.reason.removeprefix(f"{one.field}: ")) for one in self.each]


def refuse_row(wrong: Iterable[UnsupportedError]) -> None:
    """Raise UnsupportedError with all that is wrong of a row, each once, unless nothing is."""
    if each := list({(one.field, one.reason): one for one in wrong}.values()):
        raise UnsupportedError(each[0].field, each[0].reason, each[1:])


def complaints(make: Callable[[], object], field: str = "") -> list[UnsupportedError]:
    """What is wrong by what `make` raises. field: to which its refusal is put down, else its own."""
    try:
        make()
    except UnsupportedError as error:
        return error.each
    except SpecError as error:
        return [UnsupportedError(field or error.field, str(error))]
    except MopError as error:
        return [UnsupportedError(field or "row", str(error))]
    return []


def read_runs(path: Path) -> list[Row]:
    """Rows of a runs CSV. Raises MopError where run_ids are empty or repeat, a line each."""
    rows = _some(read_known(path, RUNS, "runs"), f"runs: {path}")
    seen: set[str] = set()
    wrong: list[str] = []
    unnamed = [row.number for row in rows if isinstance(row, Line) and not row["run_id"]]
    more = f" (and {len(unnamed) - 1:,} more)" if unnamed[1:] else ""
    for name in (row["run_id"] for row in rows):
        try:
            require_name(name, "run_id")
        except SpecError as error:
            wrong.append(str(error) if name else f"line {unnamed[0]}: a row has no run_id{more}")
        if name and name in seen:
            wrong.append(f"run_id {name!r} appears twice")
        seen.add(name)
    refuse(f"runs: {path}: {one}" for one in wrong)
    return rows


def read_components(path: Path) -> list[Row]:
    """Rows of a components CSV."""
    return _some(read_known(path, COMPONENTS, "components"), f"components: {path}")


def read_known(path: Path, columns: Mapping[str, Column], field: str) -> list[Row]:
    """Rows of a CSV of these columns. Raises MopError, a line each, where needed columns are missing, or
    others can only be meant for one that is."""

    def wrong(header: list[str]) -> dict[str, str]:
        missing = [name for name, one in columns.items() if one.read and name not in header]
        all_need = [name for name in missing if name in NEEDED and columns is RUNS]
        own = [name for name in unread(header, columns) if name not in NAMES]
        near = {name: misspelt(name, missing) or misspelt(name, all_need, LIKE_NEEDED) for name in own}
        found = {b: f"column {a!r} is unknown, near {b}, which is missing" for a, b in near.items() if b}
        return found | {one: f"column {one!r} names no field" for one in header if one in ROOTS}

    return read_table(path, needed(columns), field, wrong)


def unread(header: Iterable[str], columns: Mapping[str, Column]) -> list[str]:
    """Columns of a table that are none of its kind: a user's own notes."""
    return [name for name in header if name not in (*columns, SURPLUS, "") and not name.startswith(ROOTS)]


def _some(rows: list[Row], where: str) -> list[Row]:
    if not rows:
        raise MopError(f"{where}: has no row below its header")
    return rows


def wrong_cells(row: Row, columns: Mapping[str, Column]) -> Iterator[SpecError]:
    """What is wrong of each cell by itself: none of what its column may say, or no number of its kind; where
    there are too many, that alone."""
    if SURPLUS in row:
        yield SpecError("row", row[SURPLUS], _TOO_MANY)
        return
    for name, column in columns.items():
        try:
            _stated(row.get(name, ""), name, column)
            if column.kind == "count":
                count(row, name, column.least)
            elif column.kind == "documents":
                documents_of(row, name)
            elif column.kind:
                number(row, name)
        except SpecError as error:
            yield error


def stated(row: Row, columns: Mapping[str, Column]) -> Row:
    """The row with its cells as their columns write them: DeepEP and deep_ep are deepep. Raises SpecError
    naming the column where a cell is none of what it may say, or `row` where it has too many cells."""
    require(SURPLUS not in row, "row", row.get(SURPLUS), _TOO_MANY)
    return {**row, **{name: _stated(row[name], name, one) for name, one in columns.items() if name in row}}


def _stated(cell: str, name: str, column: Column) -> str:
    if not column.values or cell in UNKNOWN:
        return cell
    values, words = ({_plain(one): one for one in known} for known in (column.values, column.words))
    parts = [_plain(part) for part in cell.split("+")]
    if parts == ["unknown"]:
        return "unknown"
    found = values.get(parts[0]) if len(parts) == 1 else None
    joined = "+".join(words.get(part, "") for part in parts)
    wrong = found is None and not all(part in words for part in parts)
    require(not wrong, name, cell, not_one_of((*column.values, *column.words)))
    return found or joined


def _plain(text: str) -> str:
    """A name without its case and what separates its words."""
    return re.sub(r"[-_\s]", "", text.lower())


def number(row: Row, column: str) -> float | None:
    """The cell as a number of at least 0, None where it is empty or unknown. Raises SpecError where it is
    neither."""
    text = row.get(column, "")
    return None if text in UNKNOWN else parse_number(text, column)


def parse_number(text: str, field: str) -> float:
    """A number, 0 or from LEAST to LARGEST. Raises SpecError naming `field`."""
    try:
        value = parse_float(text)
    except ValueError:
        raise SpecError(field, text, "is not a number") from None
    rule = f"must be from 0 to {LARGEST:g}, above 0 at least {LEAST:g}"
    require(value == 0 or LEAST <= value <= LARGEST, field, text, rule)
    return value


def positive(value: float | None, field: str, cell: object) -> float | None:
    """A measured number, None where none is. Raises SpecError naming `field` where it is 0."""
    require(value != 0, field, cell, "must be above 0: leave it empty where nothing was measured")
    return value


def whole(value: float, field: str, cell: object, least: int = 1) -> int:
    """A number as a count. Raises SpecError naming `field` where it is not whole, or below `least`."""
    rule = f"is not a {'positive ' if least else ''}whole number"
    require(value == int(value) and value >= least, field, cell, rule)
    return int(value)


def count(row: Row, column: str, least: int = 1) -> int | None:
    """The cell as a whole number of at least `least`, None where it is empty or unknown. Raises SpecError
    where it is neither."""
    value = number(row, column)
    return None if value is None else whole(value, column, row[column], least)


def documents_of(row: Row, column: str) -> documents.Documents:
    """The cell as a count or MEAN/SPREAD of documents' lengths, 0 where it is empty or unknown. Raises
    SpecError where it is neither."""
    cell = row.get(column, "")
    if "/" not in cell:
        return count(row, column, least=0) or 0
    for known, _, rule in documents.rules(cell, 1):
        require(known, column, cell, rule)
    return cell
