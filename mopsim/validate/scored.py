"""A simulated run beside what was measured: errors, intervals and whether it fits."""

from dataclasses import dataclass

from mopsim.intervals.errors import Name
from mopsim.intervals.memory import PeakSpread
from mopsim.intervals.spread import Spread, fitting_in_words
from mopsim.validate.calibration import Fit
from mopsim.validate.case import Case
from mopsim.validate.simulated import Simulated


@dataclass(frozen=True)
class Scored:
    """A simulated run. Seconds and bytes. calibrated: by the runs that the hold-out leaves; peak_memory: as
    the source's instrument reads. step_spread, memory_spread: the errors to expect of both;
    tensors_spread: that of the live tensors, which decide whether it fits.

    out_of_sample: whether there was another network of the same source and GPU to calibrate on.
    """

    case: Case
    simulated: Simulated
    fit: Fit
    calibrated: float
    peak_memory: float
    step_spread: Spread
    memory_spread: Spread
    tensors_spread: Spread

    @property
    def trusted(self) -> bool:
        return trusted(self.case)

    def predicted(self, name: Name) -> float:
        """Seconds, or bytes as the instrument reads."""
        return self.calibrated if name == "step_time" else self.peak_memory

    def interval(self, name: Name, level: float) -> tuple[float, float]:
        """Where the measured value lies with probability `level`."""
        error = self.step_spread if name == "step_time" else self.memory_spread
        return error.interval(self.predicted(name), level)

    @property
    def device(self) -> PeakSpread:
        """What the fullest device needs."""
        return PeakSpread(self.simulated.fullest, self.simulated.above, self.tensors_spread)

    @property
    def p_fits(self) -> float:
        """Probability that device and host are enough."""
        return self.device.below(self.simulated.limit) * self.simulated.p_host

    @property
    def p_as_described(self) -> float:
        """The same if the program keeps what its stack says, and nothing else."""
        return self.device.as_described.below(self.simulated.limit) * self.simulated.p_host

    @property
    def likely(self) -> bool:
        """Whether it is predicted to fit, and rather does."""
        return self.simulated.fits and self.p_fits > 0.5

    @property
    def out_of_sample(self) -> bool:
        return self.fit.runs > 0

    @property
    def step_error(self) -> float | None:
        """Relative error of the calibrated step time; None where none was measured."""
        return _error(self.calibrated, self.case.measured.step_time)

    @property
    def raw_step_error(self) -> float | None:
        return _error(self.simulated.step_time, self.case.measured.step_time)

    @property
    def memory_error(self) -> float | None:
        return _error(self.peak_memory, self.case.measured.peak_memory)

    @property
    def verdict(self) -> str:
        """As `fitting_in_words`."""
        return fitting_in_words(self.simulated.fits, self.p_as_described)


def _error(predicted: float, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if measured else None


def trusted(case: Case) -> bool:
    """Whether a run may be calibrated on: not a headline, a derived or a latency-dominated one (grade C)."""
    return case.quality != "C"
