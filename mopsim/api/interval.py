"""mopsim.interval: how far a prediction may be off."""

from typing import NamedTuple

from mopsim.api.results import Simulation
from mopsim.common.arguments import named
from mopsim.engine import SimResult
from mopsim.intervals.spread import check_level


class Interval(NamedTuple):
    """(low, high) of what will be measured, each with the probability that was asked for: step_time in
    seconds, tokens_per_second of all devices together, peak_memory in bytes of the fullest device. p_fits:
    probability that the memory of device and host is enough."""

    step_time: tuple[float, float]
    tokens_per_second: tuple[float, float]
    peak_memory: tuple[float, float]
    p_fits: float


@named
def interval(prediction: Simulation | SimResult, level: float = 0.9) -> Interval:
    """Interval that holds the measured values of a prediction with probability `level`, as likely below as
    above.

    Errors are taken to be like those of published runs that share the stack, the machine type, the
    precision or the network. They are wider if nobody has published such a run (mopsim.intervals). Runs
    that calibrated the profile narrow them. Both ends of the time may lie above the prediction, if similar
    runs were slower than simulated. Raises MopError for a level outside 0.01 to 0.999."""
    result = prediction.result if isinstance(prediction, Simulation) else prediction
    fast, slow = result.step_time_interval(check_level(level, "level"))
    tokens = result.training.seq_len * result.training.global_batch
    return Interval(
        (fast, slow), (tokens / slow, tokens / fast), result.peak_memory_interval(level), result.p_fits
    )
