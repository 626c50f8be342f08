"""What `validate` says of a few runs together."""

from types import SimpleNamespace
from typing import Any

from mopsim.report.validation_tables import _together


def run(predicted: float, measured: float | None) -> Any:
    case = SimpleNamespace(measured=SimpleNamespace(step_time=measured))
    ends = 0.9 * predicted, 1.2 * predicted
    return SimpleNamespace(case=case, predicted=lambda name: predicted, interval=lambda name, level: ends)


def test_several_runs_have_a_mean_error_and_a_count_of_those_inside() -> None:
    rows = _together([run(1.1, 1.0), run(0.7, 1.0), run(9.0, None)], "step_time", 0.9)
    assert rows == [("2 runs", "step time, mean", "", "", "1 of 2 inside", "20.0%")]


def test_one_run_has_none() -> None:
    assert _together([run(1.1, 1.0), run(9.0, None)], "step_time", 0.9) == []
