"""Rules as data: what a table's row leaves unsaid in its columns, by patterns over its cells."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from mopsim.common.io import Spec
from mopsim.common.table import Row

UNKNOWN = ("", "unknown")
"""Cells that say nothing."""


class Condition(Spec, frozen=True, kw_only=True):
    """when: column -> regular expression searched in the cell in lower case, all must be found; unless: none
    may be. since, until: months (`2025-10`) between which the cell `date` must lie, the second left out; one
    that is empty is before every month."""

    when: dict[str, str]
    unless: dict[str, str] = msgspec.field(default_factory=dict)
    since: str = ""
    until: str = ""

    def fits(self, row: Row) -> bool:
        """Whether it is true of this row."""

        def found(column: str, pattern: str) -> bool:
            return re.search(pattern, row.get(column, "").lower()) is not None

        date = row.get("date", "")
        return (
            self.since <= date
            and (not self.until or date < self.until)
            and all(found(*each) for each in self.when.items())
            and not any(found(*each) for each in self.unless.items())
        )


class Rule(Condition, frozen=True, kw_only=True):
    """set: column, or dotted field, -> value; `column+` adds to a list of words joined by +. source: where it
    is written. told: an assumption to tell where it changed something. refuse: why a row cannot be expressed.
    """

    id: str
    source: str
    set: dict[str, Any] = msgspec.field(default_factory=dict)
    told: str = ""
    refuse: str = ""


@dataclass(frozen=True)
class RowFacts:
    """row: with the cells that rules filled. settings: dotted fields -> values. rules: those that were used;
    told: what is assumed."""

    row: Row
    settings: dict[str, Any]
    rules: tuple[Rule, ...]
    told: tuple[str, ...]

    def of(self, root: str) -> dict[str, Any]:
        """The settings below a root (`strategy`), by the rest of their path."""
        head = f"{root}."
        return {key.removeprefix(head): value for key, value in self.settings.items() if key.startswith(head)}


def applied(rules: Iterable[Rule], row: Row, roots: tuple[str, ...], more: Row | None = None) -> RowFacts:
    """What rules say of a row. A cell that the row states is never replaced; of rules, the last counts.
    roots: heads of dotted fields. more: cells that are derived from the row's, which rules may replace."""
    cells, settings = {**row, **(more or {})}, dict[str, Any]()
    used, told = [], []
    for rule in rules:
        if not rule.fits(cells):
            continue
        used.append(rule)
        changed = [_put(name, value, row, cells, settings, roots) for name, value in rule.set.items()]
        if rule.told and any(changed):
            told.append(rule.told)
    return RowFacts(cells, settings, tuple(used), tuple(told))


def _put(
    name: str, value: Any, row: Row, cells: Row, settings: dict[str, Any], roots: tuple[str, ...]
) -> bool:
    """Set a field, or a cell that the row leaves empty; whether it did."""
    column = name.removesuffix("+")
    if name.startswith(roots):
        settings[name] = value
        return True
    if row.get(column, "") not in UNKNOWN:
        return False
    words = cells.get(column, "").split("+") if name != column and cells.get(column) else []
    cells[column] = "+".join(dict.fromkeys([*words, str(value)]))
    return True
