"""A whole validation: cases -> simulations -> scores. Rows of a table become cases first."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mopsim.validate.calibration import HoldOut
from mopsim.validate.case import Case
from mopsim.validate.parallelism import UnsupportedError
from mopsim.validate.rows import read_case
from mopsim.validate.scoring import Scored, score
from mopsim.validate.simulated import Progress, simulate_all
from mopsim.validate.tables import Row


@dataclass(frozen=True)
class Refused:
    """A run that was not simulated, and why. about: its id, source, model, gpu, precision and quality. field:
    what is missing or cannot be said; `simulator`: it failed."""

    about: dict[str, str]
    field: str
    reason: str


@dataclass(frozen=True)
class Validation:
    """scored: runs that were simulated, in their order. refused: the others."""

    scored: list[Scored]
    refused: list[Refused] = field(default_factory=list)


def cases_of(rows: Sequence[Row], models: dict[str, Row]) -> tuple[list[Case], list[Refused]]:
    """The rows as cases, and those that are none. Raises MopError for a malformed cell."""
    cases: list[Case] = []
    refused: list[Refused] = []
    for row in rows:
        try:
            cases.append(read_case(row, models))
        except UnsupportedError as error:
            names = ("run_id", "source", "model", "gpu", "precision", "quality")
            refused.append(Refused({name: row.get(name, "") for name in names}, error.field, error.reason))
    return cases, refused


def validate(
    cases: Sequence[Case], jobs: int = 0, progress: Progress | None = None, hold_out: HoldOut = "model"
) -> Validation:
    """Simulate and score every case that can be. hold_out: what a prediction may not have learned from."""
    results = simulate_all(cases, jobs, progress)
    refused = [
        Refused(about(case), "simulator", result.error)
        for case, result in zip(cases, results, strict=True)
        if result.error
    ]
    good = [i for i, result in enumerate(results) if not result.error]
    return Validation(score([cases[i] for i in good], [results[i] for i in good], hold_out), refused)


def validate_runs(
    rows: Sequence[Row], models: dict[str, Row], jobs: int = 0, progress: Progress | None = None
) -> Validation:
    """Simulate and score every row that can be. Raises MopError for a malformed cell."""
    cases, refused = cases_of(rows, models)
    found = validate(cases, jobs, progress)
    return Validation(found.scored, refused + found.refused)


def about(case: Case) -> dict[str, str]:
    """What a run is known by."""
    return {
        "run_id": case.id, "source": case.source.name, "model": case.model_name, "gpu": case.hardware,
        "precision": case.precision, "quality": case.quality,
    }  # fmt: skip
