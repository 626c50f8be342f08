"""At how many costs of the host a case is simulated for its calibration."""

import numpy as np
import pytest

from mopsim.validate.simulated import ISSUES, SAME, paces_of


@pytest.mark.parametrize(
    ("corners", "played"),
    [
        ([(2.0, 0)], 0),  # the host never matters
        ([(0.1, 1e5)], 3),  # it always does: a straight line
        ([(2.4, 0), (0.4, 1e5)], 5),  # not up to 20 us
        ([(2.0, 0), (0.1, 1e5)], 6),
    ],
)
def test_costs_between_which_a_step_is_a_straight_line_are_not_simulated(
    corners: list[tuple[float, float]], played: int
) -> None:
    """A step is the longest of some sums of times: (seconds of the device, kernels that the host starts)."""

    def step(issue: float) -> float:
        return max(fixed + kernels * issue for fixed, kernels in corners)

    found = paces_of(step)
    assert len(found) == played
    if found:
        costs, steps = zip(*found, strict=True)
        assert [np.interp(one, costs, steps) for one in ISSUES] == pytest.approx(
            [step(one) for one in ISSUES], rel=SAME
        )
