"""All components: predicted through the same programs and costs as whole steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mopsim.common.errors import MopError
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.profiles import load_profile
from mopsim.validate import kernels, parts
from mopsim.validate.component import Component, parse
from mopsim.validate.tables import Row, UnsupportedError

Predict = Callable[[Component, HardwareProfile], float]
PREDICTORS: dict[str, Predict] = {
    "gemm": kernels.gemm,
    "attention_kernel": kernels.attention,
    "all_to_all": kernels.all_to_all,
    "expert_dispatch": parts.expert_dispatch,
    "vocabulary_projection": parts.vocabulary_projection,
    "optimizer_step": parts.optimizer_step,
    "checkpoint_offload": parts.checkpoint_offload,
}
IN_SAMPLE = ("gemm", "attention_kernel")
"""Components that the hardware profiles are fitted to (in part): their errors are residuals, not
predictions."""


@dataclass(frozen=True)
class Predicted:
    """A component with its prediction in the row's unit, or the field and reason why there is none.

    hardware: the profile it is predicted on.
    """

    component: Component
    predicted: float | None
    field: str = ""
    reason: str = ""
    hardware: HardwareProfile | None = None

    @property
    def error(self) -> float | None:
        """Relative error; None where nothing is predicted or measured, or zero was measured."""
        if self.predicted is None or not self.component.value:
            return None
        return self.predicted / self.component.value - 1.0


def predict_components(rows: Sequence[Row]) -> list[Predicted]:
    """Every row, in order; one that is malformed has no prediction."""
    return [_of_row(row) for row in rows]


def _of_row(row: Row) -> Predicted:
    try:
        return _predict(parse(row))
    except UnsupportedError as error:
        return Predicted(Component(row, {}, None), None, error.field, error.reason)


@lru_cache(maxsize=64)
def _profile(name: str) -> HardwareProfile:
    return load_profile(name)


def _predict(component: Component) -> Predicted:
    if component.kind not in PREDICTORS:
        return Predicted(component, None, "component", f"{component.kind!r} has no predictor")
    try:
        hardware = _profile(component.row["gpu"])
    except MopError as error:
        return Predicted(component, None, "gpu", str(error))
    try:
        value = PREDICTORS[component.kind](component, hardware)
        return Predicted(component, value, hardware=hardware)
    except UnsupportedError as error:
        return Predicted(component, None, error.field, error.reason)
    except MopError as error:
        return Predicted(component, None, "simulator", str(error))
    except (AssertionError, ArithmeticError, LookupError, ValueError, TypeError) as error:
        return Predicted(component, None, "simulator", f"failed: {type(error).__name__} {error}")
