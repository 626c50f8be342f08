"""What runs teach: a profile corrected by a user's own runs, and the errors to expect from published ones."""

from mopsim.calibrate.profile import (
    UNSEEN_STRATEGY,
    CalibrationResult,
    Residual,
    calibrate,
    check_output,
    engine_simulate,
    floor,
    load_measurement,
    on_stack,
    uncorrected,
)

__all__ = [
    "UNSEEN_STRATEGY",
    "CalibrationResult",
    "Residual",
    "calibrate",
    "check_output",
    "engine_simulate",
    "floor",
    "load_measurement",
    "on_stack",
    "uncorrected",
]
