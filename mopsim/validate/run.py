"""A whole validation: rows -> cases -> simulations -> scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mopsim.validate.rows import Case, UnsupportedError, case
from mopsim.validate.scoring import Scored, score
from mopsim.validate.simulated import Progress, simulate_all
from mopsim.validate.tables import Row


@dataclass(frozen=True)
class Refused:
    """A row that was not simulated, and why. field: what is missing or cannot be said; `simulator`: it
    failed."""

    row: Row
    field: str
    reason: str


@dataclass(frozen=True)
class Validation:
    """scored: rows that were simulated, in file order. refused: the others."""

    scored: list[Scored]
    refused: list[Refused] = field(default_factory=list)


def validate_runs(
    rows: Sequence[Row], models: dict[str, Row], jobs: int = 0, progress: Progress | None = None
) -> Validation:
    """Simulate and score every row that can be. Raises MopError for a malformed cell."""
    cases: list[Case] = []
    refused: list[Refused] = []
    for row in rows:
        try:
            cases.append(case(row, models))
        except UnsupportedError as error:
            refused.append(Refused(row, error.field, error.reason))
    results = simulate_all(cases, jobs, progress)
    good = [i for i, result in enumerate(results) if not result.error]
    for one, result in zip(cases, results, strict=True):
        if result.error:
            refused.append(Refused(one.row, "simulator", result.error))
    return Validation(score([cases[i] for i in good], [results[i] for i in good]), refused)
