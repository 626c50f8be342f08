"""The fit of errors to runs: on drawn sources it finds what they were drawn by."""

import math

import numpy as np
import pytest
from msgspec.structs import replace

from mopsim.intervals.errors import ErrorCell, cells
from mopsim.intervals.spread import spread
from mopsim.spec.categories import STEP_PARTS
from reports.validation.fitted_errors import (
    _Sources,
    fit_errors,
    fit_parts,
    fit_unseen,
    likeliest,
    weighted_quantile,
)
from tests.sim.test_intervals import NONE, cell


def drawn(seed: int, sources: int = 10) -> list[ErrorCell]:
    """Runs of sources with a stack each, off by 0.2, and 0.1 of their own."""
    random = np.random.default_rng(seed)
    runs = []
    for source in range(sources):
        shared = random.normal(0.05, 0.2)
        for network in "xyz":
            runs += [
                cell(str(source), str(source), network, shared + random.normal(0, 0.1)) for _ in range(4)
            ]
    return runs


def test_parts_that_err_more_are_told_by_runs_that_have_more_of_them() -> None:
    random = np.random.default_rng(0)
    runs = []
    for source in range(40):
        for share in (0.0, 0.1, 0.5, 0.9):
            made = tuple({"matmul": 1 - share, "network": share}.get(part, 0.0) for part in STEP_PARTS)
            error = random.normal(0, math.hypot(0.05 * (1 - share), 0.5 * share))
            runs.append(replace(cell(str(source), mean=error), made=made))
    parts = fit_parts(runs)
    assert parts["network"] / math.hypot(parts["always"], parts["matmul"]) == pytest.approx(10, rel=0.35)
    bare = [replace(run, made=()) for run in runs]
    assert fit_parts(bare) == {}
    with pytest.raises(AssertionError, match="of some runs it is known"):
        fit_parts([*runs, bare[0]])


def test_readings_alone_have_what_they_are_off_by() -> None:
    runs = drawn(0)
    off = [replace(run, source=f"{run.source} d", reading="device", mean=run.mean + 0.8) for run in runs]
    plain, mixed = (likeliest(cells(some)) for some in (runs, runs + off))
    assert plain.reading == plain.source_reading == 0.0
    assert mixed.reading > 0.2
    both = [math.hypot(one.stack, one.source) for one in (plain, mixed)]
    assert both[1] == pytest.approx(both[0], rel=0.3)


def test_first_scores_say_how_many_programs_are_not_as_described() -> None:
    """A third, off by a factor e."""
    known = _Sources(drawn(0))
    random = np.random.default_rng(1)
    first = [
        cell(str(100 + source), "0", mean=random.normal(0.05, 1.0 if source % 3 == 0 else 0.1))
        for source in range(300)
    ]
    found = fit_unseen(known, {"5": first}, NONE, True)
    assert found.unseen == pytest.approx(1.0, rel=0.2)
    assert found.unseen_share == pytest.approx(0.33, abs=0.1)


def test_first_scores_say_how_far_off_programs_are_before_they_are_mended() -> None:
    """Nine of ten are held, sources weighing alike."""
    known, first = _Sources(drawn(0)), [cell(str(source), "0", mean=0.1 * source) for source in range(10, 20)]
    assert fit_unseen(known, {}, NONE) == NONE
    fitted = known.told(known.all)
    found = fit_unseen(known, {"5": first}, NONE).unseen
    assert found > 0
    quantity = replace(fitted, deviations=replace(fitted.deviations, unseen=found))
    expected = [spread(quantity, run) for run in first]
    held = [
        abs(run.mean - one.mean) <= 1.645 * one.deviation for run, one in zip(first, expected, strict=True)
    ]
    assert sum(held) == 9


@pytest.mark.slow
def test_nine_of_ten_runs_of_left_out_sources_are_held() -> None:
    shares = []
    for seed in range(2):
        runs = drawn(seed)
        fitted = fit_errors(runs)
        sd = fitted.deviations
        assert sd.run == pytest.approx(0.1, rel=0.2)
        held = []
        for run in runs:
            expected = spread(fitted.leaving_out(run.source), run)
            held.append(expected.quantile(0.05) <= run.mean <= expected.quantile(0.95))
        shares.append(np.mean(held))
    assert 0.8 <= np.mean(shares) <= 0.98


def test_a_weighted_quantile() -> None:
    assert weighted_quantile([3.0, 1.0, 2.0], [1.0, 1.0, 1.0], 0.5) == 2.0
    assert weighted_quantile([3.0, 1.0, 2.0], [8.0, 1.0, 1.0], 0.5) == 3.0
    assert weighted_quantile([3.0, 1.0], [1.0, 1.0], 1.0) == 3.0
