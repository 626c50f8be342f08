"""CSVs of a user: read whole, every row as wide as the header or marked; what is none refused in one line."""

import csv
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from mopsim.common.errors import MopError, refuse
from mopsim.common.io import read_text

Row = dict[str, str]


SURPLUS = "(surplus cells)"
"""Column of a row with more cells than the header: the line where it ends."""


def read_table(
    path: Path, columns: Iterable[str], field: str, wrong: Callable[[list[str]], list[str]] = lambda _: []
) -> list[Row]:
    """Rows as text by column of the CSV that the user named as `field`; its header must have `columns`, and
    may have others, of which `wrong` says what is. A row with more cells has SURPLUS. Raises MopError naming
    what is wrong of the columns, or the line."""
    where = f"{field}: {path}"
    lines = csv.reader(io.StringIO(read_text(path, field)), strict=True, skipinitialspace=True)
    rows: list[Row] = []
    try:
        header = [cell.strip() for cell in next((cells for cells in lines if cells), [])]
        if len(header) == 1 and (other := re.search("[;\t]", header[0])):
            raise MopError(f"{where}: cells must be separated by commas, not {other.group()!r}")
        needed = list(columns)
        lacking = [column for column in needed if column not in header]
        named = ", ".join(map(repr, lacking))
        missing = [f"has no column {named}; columns found: {', '.join(header)[:200]}"] if lacking else []
        twice = [f"column {one!r} appears twice" for one in header if one and header.count(one) > 1]
        if not lacking or lacking != needed:  # else a file of another kind
            missing = [*wrong(header), *missing, *twice]
        refuse(f"{where}: {one}" for one in missing)
        for cells in lines:
            if any(cell.strip() for cell in cells):
                filled = [*cells, *[""] * (len(header) - len(cells))]
                row = {name: cell.strip() for name, cell in zip(header, filled, strict=False)}
                wide = len(cells) > len(header)
                rows.append({**row, SURPLUS: f"line {lines.line_num}"} if wide else row)
    except csv.Error as error:
        raise MopError(f"{where}: line {lines.line_num} is not CSV: {error}") from None
    return rows
