"""What a calibration leaves in a profile of the runs that it saw."""

import msgspec

from mopsim.common.errors import Rules, require_name
from mopsim.common.io import Spec
from mopsim.spec.categories import STEP_PARTS
from mopsim.spec.quantity import require_between

MOST_OFF = 5
"""Largest |ln(measured / predicted)| that a profile says of its runs."""
FEWEST_RUNS, MOST_RUNS = 1e-3, 1e6
"""Of a network; the quiet part of one that others disturbed is less than one."""


class Observed(Spec, frozen=True, kw_only=True):
    """How far off the profile still is for runs of one network, stack and precision that a calibration saw.

    stack: name of the software. precision: precision of the products. network: digest of the model. runs:
    number of runs; a disturbed run counts for its quiet part. step_time: mean ln(measured / predicted) of
    step times by the profile itself, null if they were not read. peak_memory: the same of peaks.
    step_time_squares: sum of squares of the errors of step times, by profiles that had not seen these runs.
    peak_memory_squares: sum of squares of the departures of peaks from their mean. step_time_missed: the
    |ln(measured / predicted)| that 90 % of these errors keep to. made: mean shares of the predicted steps:
    products, attention, products of experts, memory, waits for host, network, copies. source: the runs,
    each by its strategy and its digest.
    """

    stack: str
    precision: str
    network: str
    runs: float
    step_time: float | None = None
    peak_memory: float | None = None
    step_time_squares: float = 0.0
    peak_memory_squares: float = 0.0
    step_time_missed: float | msgspec.UnsetType = msgspec.UNSET
    made: tuple[float, ...] = ()
    source: str = ""

    def _rules(self) -> Rules:
        require_name(self.stack, "stack")
        require_between(self, FEWEST_RUNS, MOST_RUNS, "runs")
        most = max(1.0, self.runs) * (2 * MOST_OFF) ** 2
        require_between(self, 0, most, "step_time_squares", "peak_memory_squares")
        missed = 0 <= (self.step_time_missed or 0.0) <= 2 * MOST_OFF
        yield missed, "step_time_missed", f"must lie between 0 and {2 * MOST_OFF}: a logarithm of a ratio"
        shares = len(self.made) in (0, len(STEP_PARTS)) and all(0 <= one <= 1 for one in self.made)
        yield shares, "made", f"must be shares from 0 to 1 of {', '.join(STEP_PARTS)}, or empty"
        rule = f"must lie between -{MOST_OFF} and {MOST_OFF}: a logarithm of a ratio"
        for field in ("step_time", "peak_memory"):
            yield abs(getattr(self, field) or 0.0) <= MOST_OFF, field, rule
