"""CSVs of a user: read whole, every row as wide as the header or marked; what is none refused in one line."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from mopsim.common.errors import MopError
from mopsim.common.io import read_text

Row = dict[str, str]


SURPLUS = "(surplus cells)"
"""Column of a row with more cells than the header: the line where it ends."""


def read_table(path: Path, columns: Iterable[str], field: str) -> list[Row]:
    """Rows as text by column of the CSV that the user named as `field`; its header must have `columns`, and
    may have others. A row with more cells has SURPLUS. Raises MopError naming the column or the line."""
    where = f"{field}: {path}"
    lines = csv.reader(io.StringIO(read_text(path, field)), strict=True, skipinitialspace=True)
    rows: list[Row] = []
    try:
        header = [cell.strip() for cell in next((cells for cells in lines if cells), [])]
        if len(header) == 1 and (other := re.search("[;\t]", header[0])):
            raise MopError(f"{where}: cells must be separated by commas, not {other.group()!r}")
        for column in columns:
            if column not in header:
                raise MopError(f"{where}: has no column {column!r}; columns found: {', '.join(header)[:200]}")
        for column in header:
            if column and header.count(column) > 1:
                raise MopError(f"{where}: column {column!r} appears twice")
        for cells in lines:
            if any(cell.strip() for cell in cells):
                filled = [*cells, *[""] * (len(header) - len(cells))]
                row = {name: cell.strip() for name, cell in zip(header, filled, strict=False)}
                wide = len(cells) > len(header)
                rows.append({**row, SURPLUS: f"line {lines.line_num}"} if wide else row)
    except csv.Error as error:
        raise MopError(f"{where}: line {lines.line_num} is not CSV: {error}") from None
    return rows
