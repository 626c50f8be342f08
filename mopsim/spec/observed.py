"""What calibration leaves in a profile of the runs that it saw: how far off their predictions still were."""

from mopsim.common.errors import require, require_at_least, require_name
from mopsim.common.io import Spec

MOST_OFF = 5
"""Largest |ln(measured / predicted)| that a profile says of its runs."""


class Observed(Spec, frozen=True, kw_only=True):
    """Runs of one network, stack and precision: what their predictions by a profile left.

    stack: the software's name. precision: of the products. network: digest of the model. runs: how many.
    step_time, peak_memory: mean ln(measured / predicted), predicted by a profile that had not seen the run
    where there was another to fit, null where it was not read. source: digests of the runs.
    """

    stack: str
    precision: str
    network: str
    runs: int
    step_time: float | None = None
    peak_memory: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        require_name(self.stack, "stack")
        require_at_least(self, 1, "runs")
        for field in ("step_time", "peak_memory"):
            value = getattr(self, field)
            rule = f"must lie between -{MOST_OFF} and {MOST_OFF}: a logarithm of a ratio"
            require(value is None or abs(value) <= MOST_OFF, field, value, rule)
