"""Plans that are as fast as each other: one row, and what of it may be chosen freely."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mopsim.common.io import to_plain
from mopsim.engine import SimResult
from mopsim.search.result import TIE

TIED = "as fast as one ranked, in its row"


@dataclass
class Row:
    """The plan that leads, and those of its family that are as fast."""

    best: SimResult
    tied: list[SimResult] = field(default_factory=list)

    def freedom(self) -> dict[str, list[Any]]:
        """Fields of the strategy that differ among them: field -> values, the leading plan's first."""
        plans = [dict(_leaves(to_plain(one.strategy))) for one in (self.best, *self.tied)]
        found: dict[str, list[Any]] = {}
        for name in plans[0] | {key: None for plan in plans for key in plan}:
            values = [plan.get(name) for plan in plans]
            distinct = [value for place, value in enumerate(values) if value not in values[:place]]
            if len(distinct) > 1:
                found[name] = distinct
        return found


def rows(ranked: Sequence[SimResult], most: int) -> list[Row]:
    """The first `most` rows of results that are ranked, fastest first; what ties with a row of its family is
    in it."""
    found: list[Row] = []
    for one in ranked:
        mine = next((row for row in found if _tie(row.best, one)), None)
        if mine is not None:
            mine.tied.append(one)
        elif len(found) < most:
            found.append(Row(one))
    return found


def _tie(one: SimResult, other: SimResult) -> bool:
    near = abs(one.step_time - other.step_time) <= TIE * min(one.step_time, other.step_time)
    return near and one.strategy.name == other.strategy.name


def _leaves(node: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value
