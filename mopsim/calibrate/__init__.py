"""What runs teach: a profile corrected by a user's own runs."""

from mopsim.calibrate.observed import expected
from mopsim.calibrate.profile import (
    CalibrationResult,
    Residual,
    calibrate,
    engine_simulate,
    floor,
    uncorrected,
)
from mopsim.calibrate.runs import check_output, load_measurement, measured_in, on_stack

__all__ = [
    "CalibrationResult",
    "Residual",
    "calibrate",
    "check_output",
    "engine_simulate",
    "expected",
    "floor",
    "load_measurement",
    "measured_in",
    "on_stack",
    "uncorrected",
]
