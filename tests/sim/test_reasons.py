"""Why candidates were left out, in a user's words."""

import pytest

from mopsim.report.tables import P_FITS, p_fits
from mopsim.search.driver import NO_GAIN, NO_GAIN_IN_FAMILY
from mopsim.search.hunt import SLOWER_BOUND
from mopsim.search.reasons import plain
from mopsim.search.simulating import RISK, SLOWER


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("device memory, bound: boundaries",
         "device memory: too small even for a lower bound, most of it layer inputs"),
        ("host memory, bound: with pinned blocks and the process",
         "host memory: too small with pinned blocks and the process"),
        ("host memory, bound", "host memory: too small even for a lower bound"),
        ("memory, bound: whatever is recomputed or offloaded",
         "memory: too small whatever is recomputed or offloaded"),
        (SLOWER_BOUND, "slower than the ranked plans, even by a lower bound of the step"),
        (NO_GAIN, "at most 0.5 % faster than the best, by a lower bound of the step"),
        (NO_GAIN_IN_FAMILY,
         "at most 0.5 % faster than the best of their family, by a lower bound of the step"),
        (SLOWER, "simulated: slower than the ranked plans, or as fast and less plain"),
        ("does not fit, simulated: grads", "simulated: does not fit, most of it gradients"),
        (RISK, "simulated: fits, as described, with a probability below 0.9 (--risk ranks it)"),
        ("global batch is not a multiple of micro_batch x data groups",) * 2,
    ],
)  # fmt: skip
def test_a_reason_is_printed_in_plain_words(reason: str, said: str) -> None:
    assert plain(reason) == said


def test_the_legend_explains_as_described_where_it_is_said() -> None:
    assert p_fits("4 of 4 ranked", plain(SLOWER)) == P_FITS
    assert p_fits(plain(RISK)) == f"{P_FITS}; as described: if it does not"
