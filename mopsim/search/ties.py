"""Plans that are as fast as each other: one row, and what of it may be chosen freely."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mopsim.common.io import to_plain
from mopsim.engine import SimResult
from mopsim.search.result import SURER, TIE, Freedom

TIED = "as fast as a ranked plan, in its row"


@dataclass
class Row:
    """The plan that leads, and those of its family that are as fast."""

    best: SimResult
    tied: list[SimResult] = field(default_factory=list)

    def freedom(self) -> Freedom:
        """By what the plans that are as fast differ from the one that leads."""
        lead = dict(_leaves(to_plain(self.best.strategy)))
        changes = [_changes(lead, dict(_leaves(to_plain(one.strategy)))) for one in self.tied]
        alone: dict[str, list[Any]] = {}
        for (name, value), *more in (tuple(one.items()) for one in changes if one):
            if not more:
                values = alone.setdefault(name, [lead.get(name)])
                values += [value] * (value not in values)
        surest = max(self.tied, key=lambda one: (one.p_fits, -one.peak_memory), default=self.best)
        surer = surest if surest.p_fits - self.best.p_fits >= SURER else None
        return Freedom(alone, _together(changes), surer)


def _changes(lead: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a plan has otherwise, with its values."""
    return {name: plan.get(name) for name in {**lead, **plan} if plan.get(name) != lead.get(name)}


def _together(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Changes of several fields, fewest first, but those that smaller ones make up."""
    kept: list[dict[str, Any]] = []
    for one in sorted(changes, key=len):
        smaller = (other for other in changes if other != one and other.items() <= one.items())
        made_up = {name for other in smaller for name in other}
        if len(one) > 1 and made_up != set(one) and one not in kept:
            kept.append(one)
    return kept


def rows(ranked: Sequence[SimResult], most: int) -> list[Row]:
    """The first `most` rows of results that are ranked; what ties with a row of its family, and is as sure to
    fit, is in it."""
    found: list[Row] = []
    for one in ranked:
        mine = next((row for row in found if _tie(row.best, one)), None)
        if mine is not None:
            mine.tied.append(one)
        elif len(found) < most:
            found.append(Row(one))
    return found


def _tie(one: SimResult, other: SimResult) -> bool:
    near = abs(one.ranked_time - other.ranked_time) <= TIE * min(one.ranked_time, other.ranked_time)
    return near and one.strategy.name == other.strategy.name and one.assurance == other.assurance


def _leaves(node: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value
