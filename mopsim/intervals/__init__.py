"""How far a prediction may be off: distributions of measured over predicted, from published runs."""

from mopsim.intervals.errors import Deviations, ErrorCell, ErrorQuantity, Errors, cells, known_errors
from mopsim.intervals.memory import PeakSpread
from mopsim.intervals.spread import (
    SURE,
    Facts,
    Ratio,
    Spread,
    check_level,
    machines_share,
    missed_by_most,
    network,
    of_peak_memory,
    of_step_time,
    products,
    ratio,
    spread,
)

__all__ = [
    "SURE",
    "Deviations",
    "ErrorCell",
    "ErrorQuantity",
    "Errors",
    "Facts",
    "PeakSpread",
    "Ratio",
    "Spread",
    "cells",
    "check_level",
    "known_errors",
    "machines_share",
    "missed_by_most",
    "network",
    "of_peak_memory",
    "of_step_time",
    "products",
    "ratio",
    "spread",
]
