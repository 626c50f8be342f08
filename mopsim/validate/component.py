"""One measured component as a record."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from mopsim.common.errors import MopError, SpecError, shown
from mopsim.common.json_text import parse_json
from mopsim.common.shipped import shipped
from mopsim.validate.tables import Row, UnsupportedError, parse_number, positive, whole

T = TypeVar("T")


@dataclass(frozen=True)
class Component:
    """A row of the components CSV, its params parsed. value: SI units, GiB for memory; None where it ran
    out."""

    row: Row
    params: dict[str, object]
    value: float | None

    @property
    def kind(self) -> str:
        return self.row["component"]

    @property
    def system(self) -> str:
        return self.row.get("system", "")

    @property
    def metric(self) -> str:
        return self.row["metric"]

    def does(self, what: str) -> bool:
        """Whether its system does it (data/systems.yaml)."""
        pattern = _systems()[what]
        return re.search(pattern, self.system.lower()) is not None

    def number(self, name: str) -> float:
        """A parameter as a number. Raises UnsupportedError where it is missing or no size has it."""
        try:
            float(str(self.params[name]))
        except (KeyError, ValueError):
            raise UnsupportedError(name, "not stated by the source") from None
        return _checked(lambda: parse_number(str(self.params[name]), name))

    def count(self, name: str) -> int:
        """A parameter that counts something: a positive whole number. Raises as `number` does."""
        value = self.number(name)
        return _checked(lambda: whole(value, name, self.params[name]))

    def text(self, name: str) -> str:
        return str(self.params.get(name, ""))


@cache
def _systems() -> dict[str, str]:
    return dict(shipped("mopsim.validate", "data/systems.yaml"))


def parse(row: Row) -> Component:
    """Raises UnsupportedError where params is no JSON object or the value no number."""
    try:
        params = parse_json(row["params"] or "{}", "params")
    except MopError as error:
        raise UnsupportedError("params", str(error)) from None
    if not isinstance(params, dict):
        raise UnsupportedError("params", f"{shown(row['params'])} is not a JSON object")
    return Component(row, params, _checked(lambda: _value(row)))


def _value(row: Row) -> float | None:
    found = parse_number(row["value"], "value") if row["value"] else None
    spent = row["metric"] in ("latency_s", "flops_per_s", "peak_memory_gib")
    return positive(found, "value", row["value"]) if spent else found


def _checked(read: Callable[[], T]) -> T:
    """What `read` returns; its refusal is that of the row."""
    try:
        return read()
    except SpecError as error:
        raise UnsupportedError(error.field, f"{shown(error.value)} {error.rule}") from None
