"""What a row leaves unsaid in its columns: its notes in a standard form, and what recipes set. All of it is
data.

data/stacks.yaml names the stack of a source, data/notes.yaml what notes mean, data/recipes.yaml what
programs set for one network, machine or release. A cell that the row states is never replaced; of rules,
the last counts.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from mopsim.common import io
from mopsim.validate.tables import UNKNOWN, Row

ROOTS = ("strategy.", "model.", "stack.")
"""Heads of dotted fields of a case: also columns that a table may have, each overriding every rule."""


class Rule(io.Spec, frozen=True, kw_only=True):
    """when: column -> regular expression searched in the cell in lower case, all must be found; unless: none
    may be. set: column, or dotted field, -> value; `column+` adds to a list of words joined by +. source:
    where it is written."""

    id: str
    when: dict[str, str]
    set: dict[str, Any]
    source: str
    unless: dict[str, str] = msgspec.field(default_factory=dict)

    def fits(self, row: Row) -> bool:
        """Whether the rule is of this row."""

        def found(column: str, pattern: str) -> bool:
            return re.search(pattern, row.get(column, "").lower()) is not None

        return all(found(*each) for each in self.when.items()) and not any(
            found(*each) for each in self.unless.items()
        )


@dataclass(frozen=True)
class Facts:
    """row: with the cells that rules filled. settings: dotted fields of the case -> values. rules: the ids of
    those that were used."""

    row: Row
    settings: dict[str, Any]
    rules: tuple[str, ...]

    def of(self, root: str) -> dict[str, Any]:
        """The settings below a root (`strategy`), by the rest of their path."""
        head = f"{root}."
        return {key.removeprefix(head): value for key, value in self.settings.items() if key.startswith(head)}


def _data(name: str) -> Any:
    text = files("mopsim.validate").joinpath(f"data/{name}").read_text(encoding="utf-8")
    return io.parse_yaml(text, name)


@cache
def rules() -> tuple[Rule, ...]:
    """All rules, in the order in which they are tried."""
    return tuple(
        io.convert(one, Rule, "rule", name) for name in ("notes.yaml", "recipes.yaml") for one in _data(name)
    )


@cache
def stack_names() -> dict[str, str]:
    """Source -> stack."""
    return dict(_data("stacks.yaml"))


def facts(row: Row) -> Facts:
    """All that is known of a row. `stack` is looked up from `source` where it is missing; `stages` is pp x
    vp; `graphs` are the components that CUDA graphs replay, joined by +, or `step`."""
    cells = {**row, "stages": _stages(row)}
    if cells.get("stack", "") in UNKNOWN:
        cells["stack"] = stack_names().get(row["source"], "")
    settings: dict[str, Any] = {}
    used = []
    for rule in rules():
        if rule.fits(cells):
            used.append(rule.id)
            for name, value in rule.set.items():
                _put(name, value, row, cells, settings)
    graphs = cells.get("graphs", "")
    if graphs not in (*UNKNOWN, "none"):
        settings["stack.host.graphs"] = graphs.split("+")
    for name, cell in row.items():
        if name.startswith(ROOTS) and cell:
            settings[name] = io.parse_yaml(cell, f"{row.get('run_id', 'row')}: {name}")
    return Facts(cells, settings, tuple(used))


def _put(name: str, value: Any, row: Row, cells: Row, settings: dict[str, Any]) -> None:
    column = name.removesuffix("+")
    if name.startswith(ROOTS):
        settings[name] = value
    elif row.get(column, "") in UNKNOWN:
        before = cells.get(column, "") if name != column else ""
        cells[column] = value if not before else before if value in before.split("+") else f"{before}+{value}"


def _stages(row: Row) -> str:
    """Parts of the pipeline: its degree times its virtual stages; '' where one is no number."""
    degrees = (row.get("pp", ""), row.get("vp", "") or "1")
    return str(int(degrees[0]) * int(degrees[1])) if all(one.isdigit() for one in degrees) else ""
