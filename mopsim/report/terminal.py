"""Tables on a terminal of 80 columns: no vertical rules, one blank between columns."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mopsim.common.units import UNITS, format_bytes, format_number, format_seconds


def table(
    title: str, left: Sequence[str], right: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()
) -> Table:
    """A table: `left` columns are text, `right` ones numbers."""
    found = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    for name in left:
        found.add_column(name, overflow="fold")
    for name in right:
        found.add_column(name, justify="right", overflow="fold")
    for row in rows:
        found.add_row(*row)
    return found


def numbered(lines: Sequence[Text]) -> Table:
    """Lines under a number each, or under none where it is one; what wraps is indented."""
    found = Table.grid(padding=(0, 1, 0, 0))
    for number, line in enumerate(lines, 1):
        found.add_row(Text(str(number), style=line.style), line)
    return found


def points(lines: Sequence[str]) -> Table:
    """Lines under a dash each; what wraps is indented."""
    found = Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        found.add_row("-", Text(line))
    return found


def size(num_bytes: float) -> str:
    """'79.3 GiB' or '138 GiB': what a column of eight has room for."""
    text = format_bytes(num_bytes, 1)
    return text if len(text) <= 8 else format_bytes(num_bytes, 0)


def duration(seconds: float) -> str:
    """'12.3 ms', '9,876 s' or '5.05 h': what a column of eight has room for, and one of its interval."""
    return format_seconds(seconds) if seconds < 9999.5 else f"{format_number(seconds / UNITS['h'])} h"
