"""What calibration leaves in a profile of the runs that it saw: how far off their predictions still were."""

import msgspec

from mopsim.common.errors import Rules, require_at_least, require_name
from mopsim.common.io import Spec

MOST_OFF = 5
"""Largest |ln(measured / predicted)| that a profile says of its runs."""


class Observed(Spec, frozen=True, kw_only=True):
    """Runs of one network, stack and precision: what their predictions by a profile left.

    stack: the software's name. precision: of the products. network: digest of the model. runs: how many, a
    disturbed one for the part of it that was quiet. step_time, peak_memory: mean ln(measured / predicted) by
    the profile itself, null where it was not read. step_time_squares: sum of the squares of what profiles
    that had not seen these runs missed of their step times. step_time_missed: the |ln(measured / predicted)|
    that 90 % of these misses keep to. source: digests of the runs.
    """

    stack: str
    precision: str
    network: str
    runs: float
    step_time: float | None = None
    peak_memory: float | None = None
    step_time_squares: float = 0.0
    step_time_missed: float | msgspec.UnsetType = msgspec.UNSET
    source: str = ""

    def _rules(self) -> Rules:
        require_name(self.stack, "stack")
        yield self.runs > 0, "runs", "must be positive"
        require_at_least(self, 0, "step_time_squares")
        yield (self.step_time_missed or 0.0) >= 0, "step_time_missed", "must be at least 0"
        rule = f"must lie between -{MOST_OFF} and {MOST_OFF}: a logarithm of a ratio"
        for field in ("step_time", "peak_memory"):
            yield abs(getattr(self, field) or 0.0) <= MOST_OFF, field, rule
