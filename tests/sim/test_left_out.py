"""Sources that are left out of a fit: by blocks of one inverse as by the conditional normal without them."""

import math

import numpy as np
import pytest
from msgspec.structs import replace

from mopsim.intervals.errors import Deviations, ErrorCell, ErrorQuantity, cells
from mopsim.intervals.spread import joint
from reports.validation.left_out import FITTED, Expected, Folds

SD = Deviations(**{name: 0.05 + 0.01 * i for i, name in enumerate(FITTED)})
STILL = np.zeros(len(FITTED))


def runs() -> dict[str, list[ErrorCell]]:
    """Of five sources, some of which share a stack, a network or both."""
    random = np.random.default_rng(0)
    return {
        source: [
            ErrorCell(
                source=source, stack=f"s{i % 2}", hardware=f"h{i % 3}", precision="bf16", network=network,
                reading="r" if network == "x" else "", runs=1, mean=random.normal(0.1, 0.3),
            )
            for network in ("x", "y", f"n{i}")
            for _ in range(3)
        ]
        for i, source in enumerate("abcde")
    }  # fmt: skip


def known(sd: Deviations = SD) -> ErrorQuantity:
    return ErrorQuantity(deviations=sd, cells=cells(run for some in runs().values() for run in some))


def conditional(whole: ErrorQuantity, source: str, without: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(cell for cell in whole.cells if cell.source not in without)
    asked = [replace(cell, runs=1) for cell in whole.cells if cell.source == source]
    return joint(replace(whole, cells=others), asked)


def check(found: Expected, means: np.ndarray, covariances: np.ndarray, within: float) -> None:
    covariance = found.covariances + found.run * np.eye(len(found.means))
    assert found.means == pytest.approx(means, abs=within)
    assert covariance == pytest.approx(covariances, abs=within)


@pytest.mark.parametrize("without", [("b",), ("b", "d"), ("d", "b")])
def test_what_others_tell_of_a_source(without: tuple[str, ...]) -> None:
    (found,) = Folds(known(), runs()).expected(SD, [(without, STILL)])
    for source, one in zip(without, found, strict=True):
        check(one, *conditional(known(), source, without), within=1e-10)


def test_other_deviations_move_it_to_first_order() -> None:
    """What is left over is of second order: a quarter of it where all move by half as much."""
    folds, logs = Folds(known(), runs()), np.linspace(-0.1, 0.1, len(FITTED))
    off = []
    for by in (1.0, 0.5):
        moved = Deviations(
            **{name: getattr(SD, name) * math.exp(by * log) for name, log in zip(FITTED, logs, strict=True)}
        )
        ((first, _),) = folds.expected(SD, [(("b", "d"), by * logs)])
        means, covariances = conditional(known(moved), "b", ("b", "d"))
        check(first, means, covariances, within=1e-3)
        off.append(np.max(np.abs(first.means - means)))
    assert off[1] == pytest.approx(off[0] / 4, rel=0.2)


def test_pairs_are_runs_of_a_network_on_a_machine_type() -> None:
    """Of five sources, three cells of three runs each: single runs weigh 1/9, pairs of one program 1/9."""
    folds = Folds(known(), runs())
    expected = [
        one for found in folds.expected(SD, [((source,), STILL) for source in "abcde"]) for one in found
    ]
    single, paired = folds.scores(expected)
    assert single.weights == pytest.approx(np.full(45, 1 / 9))
    assert paired.weights == pytest.approx(np.full(45, 1 / 9))
