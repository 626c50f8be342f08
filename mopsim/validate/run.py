"""A whole validation: cases -> simulations -> scores. Rows of a table become cases first."""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as fresh

from mopsim.validate.calibration import HoldOut
from mopsim.validate.case import Case
from mopsim.validate.rows import read_case
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import score
from mopsim.validate.simulated import Progress, Simulated, simulate_all
from mopsim.validate.tables import Row, UnsupportedError

SIDE_BY_SIDE: tuple[HoldOut, ...] = ("source", "model")
"""Hold-outs that every validation states."""


@dataclass(frozen=True)
class Refused:
    """A run that was not simulated. about: its id, source, model, gpu, precision and quality. complaints:
    (field, reason) of each that is missing or cannot be said; `simulator`: it failed."""

    about: dict[str, str]
    complaints: list[tuple[str, str]]

    @property
    def field(self) -> str:
        """The first that is told."""
        return self.complaints[0][0]

    @property
    def told(self) -> list[str]:
        """`field: reason` of each."""
        return [f"{name}: {why}" for name, why in self.complaints]


@dataclass(frozen=True)
class Validation:
    """scored: runs that were simulated, in their order. refused: the others. held: the same runs scored under
    each hold-out that was asked for."""

    scored: list[Scored]
    refused: list[Refused] = fresh(default_factory=list)
    held: dict[HoldOut, list[Scored]] = fresh(default_factory=dict)


def cases_of(rows: Sequence[Row], models: dict[str, Row]) -> tuple[list[Case], list[Refused]]:
    """The rows as cases, and those that are none. Raises MopError for a malformed cell."""
    cases: list[Case] = []
    refused: list[Refused] = []
    for row in rows:
        try:
            cases.append(read_case(row, models))
        except UnsupportedError as error:
            names = ("run_id", "source", "model", "gpu", "precision", "quality")
            refused.append(Refused({name: row.get(name, "") for name in names}, error.complaints))
    return cases, refused


def validate(
    cases: Sequence[Case], jobs: int = 0, progress: Progress | None = None, hold_out: HoldOut = "source",
    refused: Sequence[Refused] = (),
) -> Validation:  # fmt: skip
    """Simulate and score every case that can be. hold_out: what a prediction may not have learned from, for
    `scored`; `held` has both its source and its network. refused: rows that are no cases."""
    results = simulate_all(cases, jobs, progress)
    known = [(case, result) for case, result in zip(cases, results, strict=True) if not result.error]
    held = scored_by(known, hold_out)
    return Validation(held[hold_out], [*refused, *refused_of(cases, results)], held)


def refused_of(cases: Sequence[Case], results: Sequence[Simulated]) -> list[Refused]:
    """Cases that were not simulated, each with the field that is to blame."""
    return [
        Refused(about(case), UnsupportedError(result.field, result.error).complaints)
        for case, result in zip(cases, results, strict=True)
        if result.error
    ]


def scored_by(known: Sequence[tuple[Case, Simulated]], hold_out: HoldOut) -> dict[HoldOut, list[Scored]]:
    """The runs under SIDE_BY_SIDE and `hold_out`."""
    cases, results = [case for case, _ in known], [result for _, result in known]
    return {one: score(cases, results, one) for one in dict.fromkeys((*SIDE_BY_SIDE, hold_out))}


def about(case: Case) -> dict[str, str]:
    """What a run is known by."""
    return {
        "run_id": case.id, "source": case.source.name, "model": case.model_name, "gpu": case.hardware,
        "precision": case.precision, "quality": case.quality,
    }  # fmt: skip
