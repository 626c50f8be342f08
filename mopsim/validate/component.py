"""One measured component as a record."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mopsim.common.errors import MopError, SpecError, require, shown
from mopsim.common.explain import not_one_of
from mopsim.common.json_text import parse_json
from mopsim.common.shipped import kept
from mopsim.validate import tables
from mopsim.validate.columns import COMPONENTS
from mopsim.validate.tables import UNKNOWN, Row, UnsupportedError

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
        pattern = kept("mopsim.validate", "data/systems.yaml")[what]
        return re.search(pattern, self.system.lower()) is not None

    @property
    def router(self) -> str:
        """The network whose router chose its rows' experts (data/systems.yaml); "": drawn alike."""
        routers = kept("mopsim.validate", "data/systems.yaml")["routers"]
        named = (model for system, model in routers.items() if re.search(system, self.system.lower()))
        return str(next(named, ""))

    @property
    def gpus(self) -> int:
        """Devices in all; 8 where none are stated. Raises UnsupportedError."""
        return _checked(lambda: tables.count(self.row, "num_gpus")) or 8

    def states(self, name: str) -> bool:
        """Whether the source says this parameter."""
        return self.params.get(name) not in (None, *UNKNOWN)

    def number(self, name: str) -> float:
        """A parameter as a number. Raises UnsupportedError where it is missing or no size has it."""
        if not self.states(name):
            raise UnsupportedError(name, "not stated by the source")
        return _checked(lambda: tables.parse_number(str(self.params[name]), name))

    def count(self, name: str) -> int:
        """A parameter that counts something: a positive whole number. Raises as `number` does."""
        value = self.number(name)
        return _checked(lambda: tables.whole(value, name, self.params[name]))

    def one_of(self, name: str, *known: str) -> str:
        """A parameter that names something, the first where it is not stated. Raises UnsupportedError."""
        text = self.text(name).lower() if self.states(name) else known[0]
        if text not in known:
            raise UnsupportedError(name, f"{shown(self.params[name])} {not_one_of(known)}")
        return text

    def text(self, name: str) -> str:
        return str(self.params.get(name, ""))


def parse(row: Row) -> Component:
    """Raises UnsupportedError where params is no JSON object, the value no number, or it and the outcome
    contradict each other."""
    row = _checked(lambda: tables.stated(row, COMPONENTS))
    tables.refuse_row(
        [*tables.complaints(lambda: _params(row)), *tables.complaints(lambda: _checked(lambda: _value(row)))]
    )
    return Component(row, _params(row), _value(row))


def _params(row: Row) -> dict[str, object]:
    try:
        params = parse_json(row["params"] or "{}", "params")
    except MopError as error:
        raise UnsupportedError("params", str(error)) from None
    if not isinstance(params, dict):
        raise UnsupportedError("params", f"{shown(row['params'])} is not a JSON object")
    return params


def _value(row: Row) -> float | None:
    found = tables.number(row, "value")
    require(
        found is None or row.get("outcome") != "oom", "outcome", "oom", "is not of a row that has a value"
    )
    spent = row["metric"] in ("latency_s", "flops_per_s", "peak_memory_gib")
    return tables.positive(found, "value", row["value"]) if spent else found


def _checked(read: Callable[[], T]) -> T:
    """What `read` returns; its refusal is that of the row."""
    try:
        return read()
    except SpecError as error:
        raise UnsupportedError(error.field, f"{shown(error.value)} {error.rule}") from None
