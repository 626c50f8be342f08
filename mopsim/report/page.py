"""A report: one list of sections, written as Markdown (index.md) and as HTML (index.html) beside its
pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from mopsim.common.io import write_text
from mopsim.common.units import format_bytes, format_number, format_probability, format_seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """text: columns of words, beside the first; chosen: the row that stands out (in decision.html alone)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[str] = ()
    chosen: Sequence[str] = ()

    @classmethod
    def of(cls, things: Iterable[T], columns: Mapping[str, Callable[[T], str]]) -> "Table":
        """A row for each thing. columns: by head, what a cell says of it."""
        return cls(list(columns), [[say(one) for say in columns.values()] for one in things])


@dataclass(frozen=True)
class Section:
    """A heading, then text, a table and a picture, each where given. picture: (file name, what it shows)."""

    title: str
    text: str = ""
    table: Table | None = None
    picture: tuple[str, str] | None = None


@dataclass(frozen=True)
class Page:
    """title: the finding. facts: the command that makes the report, profile digest, version, seed."""

    title: str
    summary: str
    sections: Sequence[Section]
    facts: dict[str, str] = field(default_factory=dict)


@cache
def templates(escape: bool = False) -> Environment:
    """The templates beside this module, whose filters are the formats of `common.units`, and `f`, Python's
    own. escape: for HTML."""
    found = Environment(
        loader=PackageLoader("mopsim.report"), autoescape=escape, trim_blocks=True,
        keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    found.filters |= {"bytes": format_bytes, "seconds": format_seconds, "number": format_number}
    found.filters |= {"odds": format_probability, "f": format}
    return found


def write_page(folder: Path, page: Page) -> None:
    """Write index.md and index.html into `folder`."""
    for kind in ("md", "html"):
        text = templates(kind == "html").get_template(f"page.{kind}.j2").render(page=page)
        write_text(folder / f"index.{kind}", text)
