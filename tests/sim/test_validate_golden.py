"""Published runs, each with its own tolerance, uncalibrated: curves of the profiles and nothing else.

data/golden_runs.csv: rows of the table of published runs (its `source_ref` says where each was printed) with
two columns more, relative tolerances of step time and peak memory: what the prediction missed by when the row
was taken in, and 3 % more. A row that moves away fails; a tolerance is lowered when a mechanism is mended,
never raised.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mopsim.validate.models import read_rows
from mopsim.validate.rows import read_case
from mopsim.validate.run import cases_of
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import score
from mopsim.validate.simulated import simulate_case
from mopsim.validate.tables import UnsupportedError, read_runs

DATA = Path(__file__).parent / "data"
ROWS = read_runs(DATA / "golden_runs.csv")
NETWORKS = read_rows(DATA / "golden_models.csv")


@cache
def scored(name: str) -> Scored:
    """A row by its id, simulated once."""
    (row,) = (row for row in ROWS if row["run_id"] == name)
    (case,), refused = cases_of([row], NETWORKS)
    assert not refused
    found = simulate_case(case, paced=False)  # nothing is calibrated
    assert not found.error
    return score([case], [found])[0]


def test_rows_span_families_and_sources() -> None:
    assert len(ROWS) >= 30
    assert len({row["source"] for row in ROWS}) >= 6
    assert {"none", "zero1", "zero3"} <= {row["sharding"] for row in ROWS}
    assert all(row["source_ref"] for row in ROWS)


MISSED = {
    "llm-foundry-mpt350m-a100x8-bf16-s32768-fdb65": (
        0.08,
        "7 % too slow (6 %), 5 % before the two cross"
        " entropies that Composer's metrics compute again (llm-foundry.yaml): five sixths of it are attention"
        " of heads of 64 in Triton, priced by the middle of a published range (1.3 to 2.5)",
    ),
    "megatron-selene-2022-turing530b-a100x280-fp16-s2048-fdfe2": (
        0.061,
        "6.001 % too slow (6 %), 5.999 % before the embedding's gradient was written, read and added to its"
        " sum in every microbatch, as torch and Megatron-Core's hook of a parameter do and a profile shows",
    ),
}
"""Rows beyond their tolerance, which stands: what mends one makes its test fail until it leaves this list.
With how far off they may be meanwhile."""


def _case(row: dict[str, str]) -> Any:
    missed = MISSED.get(row["run_id"])
    marks = [pytest.mark.xfail(strict=True, reason=missed[1]), _beside(row["run_id"])] if missed else []
    return pytest.param(row, id=row["run_id"], marks=marks)


def _beside(name: str) -> Any:
    """Both tests of a missed run in one worker, which simulates it once."""
    return pytest.mark.xdist_group(name)


@pytest.mark.parametrize("name", [pytest.param(one, marks=_beside(one)) for one in MISSED])
def test_a_missed_run_is_missed_by_no_more(name: str) -> None:
    error = scored(name).raw_step_error
    assert error is not None
    assert abs(error) <= MISSED[name][0]


@pytest.mark.parametrize("row", [_case(row) for row in ROWS])
def test_published_run(row: dict[str, str]) -> None:
    one = scored(row["run_id"])
    assert one.raw_step_error is not None
    assert abs(one.raw_step_error) <= float(row["step_tolerance"])
    if row["memory_tolerance"]:
        assert one.memory_error is not None
        assert abs(one.memory_error) <= float(row["memory_tolerance"])


def test_one_wrong_cell_is_the_only_complaint() -> None:
    for row in ROWS:
        with pytest.raises(UnsupportedError) as told:
            read_case({**row, "document_tokens": "x"}, NETWORKS)
        assert [one.reason for one in told.value.each] == ["document_tokens: 'x' is not a number"]
