"""CSVs of a user: read whole, every row as wide as the header or marked; what is none refused in one line."""

import csv
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from mopsim.common.errors import MopError, refuse
from mopsim.common.io import read_text

Row = dict[str, str]


class Line(Row):
    """A row as it was read, with the line of the file where it ends."""

    number = 0


SURPLUS = "(surplus cells)"
"""Column of a row with more cells than the header: the line where it ends."""


def read_table(
    path: Path,
    columns: Iterable[str],
    field: str,
    wrong: Callable[[list[str]], dict[str, str]] = lambda _: {},
) -> list[Row]:
    """Rows as text by column of the CSV that the user named as `field`; its header must have `columns`, and
    may have others, of which `wrong` says what is, by the column that is meant.
    A row with more cells has SURPLUS. Raises MopError naming
    what is wrong of the columns, or the line."""
    where = f"{field}: {path}"
    lines = csv.reader(io.StringIO(read_text(path, field)), strict=True, skipinitialspace=True)
    rows: list[Line] = []
    try:
        header = [cell.strip() for cell in next((cells for cells in lines if cells), [])]
        if len(header) == 1 and (other := re.search("[;\t]", header[0])):
            raise MopError(f"{where}: cells must be separated by commas, not {other.group()!r}")
        needed = list(columns)
        lacking = [column for column in needed if column not in header]
        near = wrong(header) if not lacking or lacking != needed else {}  # else a file of another kind
        named = ", ".join(repr(column) for column in lacking if column not in near)
        missing = [f"has no column {named}; columns found: {cut(', '.join(header), 200)}"] if named else []
        twice = [f"column {one!r} appears twice" for one in header if one and header.count(one) > 1]
        if not lacking or lacking != needed:
            missing = [*near.values(), *missing, *twice]
        refuse(f"{where}: {one}" for one in missing)
        for cells in lines:
            if any(cell.strip() for cell in cells):
                filled = [*cells, *[""] * (len(header) - len(cells))]
                row = {name: cell.strip() for name, cell in zip(header, filled, strict=False)}
                wide = len(cells) > len(header)
                rows.append(Line(row | ({SURPLUS: f"line {lines.line_num}"} if wide else {})))
                rows[-1].number = lines.line_num
    except csv.Error as error:
        raise MopError(f"{where}: line {lines.line_num} is not CSV: {error}") from None
    return [*rows]


def cut(names: str, most: int) -> str:
    """A list with commas of at most so many letters, whole names of it and then an ellipsis."""
    return names if len(names) <= most else f"{names[:most].rpartition(',')[0] or names[:most]}, ..."
