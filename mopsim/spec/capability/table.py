"""The capability table: a row for every field of Strategy, ModelSpec, TrainSpec and Stack (fields.yaml)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mopsim.common.errors import SpecError
from mopsim.common.io import leaves
from mopsim.common.shipped import kept
from mopsim.spec.capability.expressions import SIDES, holds
from mopsim.spec.capability.job import Job
from mopsim.spec.stack import Stack
from mopsim.spec.strategy_rules import WORDS

Side = str
"""A key of SIDES."""
RUNTIMES = tuple(side for side, one in SIDES.items() if "runs" in one)
EXPORTS = tuple(side for side in SIDES if side not in ("simulator", *RUNTIMES))


@dataclass(frozen=True)
class Cell:
    """What one side does with a field: plays every value (values None), or only these, because of `why`; or
    it has no part in what the side does (`reads` False), because of `why`. says: what other values are."""

    values: tuple[Any, ...] | None = None
    why: str = ""
    reads: bool = True
    says: str = "is not {does}"

    def refuse(self, side: Side, path: str, value: Any) -> SpecError | None:
        """The error that names the field, the values that work and the reason; None where the value works.
        Lists of names are sets."""
        if self.values is None or value in self.values:
            return None
        if path.removeprefix("strategy.") in WORDS and set(value) in map(set, self.values):
            return None
        names = " or ".join(repr(one) for one in self.values)
        reason = f": {self.why}" if self.why else ""
        said = self.says.format(does=SIDES[side]["does"])
        return SpecError(path, value, f"{said}, only {names}{reason}")


@dataclass(frozen=True)
class FieldRow:
    """One field. acts: the condition under which the field has anything to act on, empty: always."""

    cells: Mapping[Side, Cell]
    acts: str = ""
    usual: bool = False
    """Whether the cells are those of every field of the noun."""

    def acts_in(self, job: Job) -> bool:
        return not self.acts or holds(self.acts)(job)

    def concerns(self, side: Side, job: Job) -> bool:
        """Whether the side has to do something with the field's value."""
        return side in RUNTIMES or self.acts_in(job)


_READ = kept(__package__, "fields.yaml")


def _cell(said: Any) -> Cell:
    """A cell as fields.yaml says it: `all`, a reason's name, a list of values, or a mapping."""
    if said == "all":
        return Cell()
    if isinstance(said, list):
        said = {"only": said}
    if isinstance(said, str):
        said = {"skips": said}
    why = said.get("skips", said.get("why", ""))
    values = (
        tuple(tuple(one) if isinstance(one, list) else one for one in said["only"])
        if "only" in said
        else None
    )
    says = said.get("says", Cell.says)
    return Cell(values, _READ["reasons"].get(why, why), reads="skips" not in said, says=says)


def _row(said: Mapping[str, Any], every: Mapping[str, Any]) -> FieldRow:
    told = {**every, **said}
    groups = {**dict.fromkeys(RUNTIMES, "mopexec"), **dict.fromkeys(EXPORTS, "exports")}
    cells = {}
    for side, known in SIDES.items():
        names = (side, known.get("like", ""), groups.get(side, ""))
        cells[side] = _cell(next((told[name] for name in names if name in told), "all"))
    return FieldRow(cells, told.get("acts", ""), set(said) <= {"acts"})


def _rows(noun: str) -> Iterator[tuple[str, FieldRow]]:
    said = dict(_READ[noun])
    every = said.pop("every", {})
    if noun == "stack":
        said |= {field: {} for field, _ in leaves(Stack) if field not in said}
    for field, one in said.items():
        yield f"{noun}.{field}", _row(one, every)


ROWS = {path: row for noun in ("model", "strategy", "training", "stack") for path, row in _rows(noun)}
"""By the field's path in a plan, in the order in which refusals are told."""
LIMITED = {
    side: {path: row for path, row in ROWS.items() if row.cells[side].values is not None} for side in SIDES
}
"""Those of which a side takes some values only."""
