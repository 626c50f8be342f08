"""Predicted against measured: cases of runs -> simulations -> scores. Rows of a table become cases first."""

from mopsim.validate.case import Case, read_cases, write_cases
from mopsim.validate.components import Predicted, predict_components
from mopsim.validate.run import Refused, Validation, cases_of, validate

__all__ = [
    "Case",
    "Predicted",
    "Refused",
    "Validation",
    "cases_of",
    "predict_components",
    "read_cases",
    "validate",
    "write_cases",
]
