"""All components: predicted through the same programs and costs as whole steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mopsim.common.errors import MopError
from mopsim.common.explain import not_one_of
from mopsim.spec.hardware import HardwareProfile
from mopsim.validate import kernels, parts
from mopsim.validate.case import machine
from mopsim.validate.component import Component, parse
from mopsim.validate.tables import Row, UnsupportedError, complaints, refuse_row

Predict = Callable[[Component, HardwareProfile], float]


class Predictor(NamedTuple):
    """metrics: what it predicts, in the units of their names; another is no number of its."""

    predict: Predict
    metrics: tuple[str, ...]


PREDICTORS: dict[str, Predictor] = {
    "gemm": Predictor(kernels.gemm, ("latency_s", "flops_per_s")),
    "attention_kernel": Predictor(kernels.attention, ("latency_s", "flops_per_s")),
    "all_to_all": Predictor(kernels.all_to_all, ("latency_s", "bandwidth_bytes_per_s")),
    "expert_dispatch": Predictor(parts.expert_dispatch, ("latency_s", "peak_memory_gib", "speedup")),
    "vocabulary_projection": Predictor(
        parts.vocabulary_projection,
        (
            "latency_s", "peak_memory_gib", "peak_memory_increment_gib", "projection_weight_gib",
            "resident_memory_gib",
        ),
    ),
    "optimizer_step": Predictor(
        parts.optimizer_step, ("latency_s", "num_buckets", "largest_bucket_params", "staging_memory_gib")
    ),
    "checkpoint_offload": Predictor(
        parts.checkpoint_offload, ("latency_s", "tokens_per_s_per_gpu", *parts.HELD, *parts.UNSTATED)
    ),
}  # fmt: skip
IN_SAMPLE = ("gemm", "attention_kernel")
"""Components that the hardware profiles are fitted to (in part): their errors are residuals, not
predictions."""


@dataclass(frozen=True)
class Predicted:
    """A component with its prediction in the row's unit, or the field and reason why there is none, with
    those of other cells in `more`.

    hardware: the profile it is predicted on.
    """

    component: Component
    predicted: float | None
    field: str = ""
    reason: str = ""
    more: tuple[tuple[str, str], ...] = ()
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
        refuse_row([*complaints(lambda: parse(row)), *_names_wrong(row)])
        return _predict(parse(row))
    except UnsupportedError as error:
        more = tuple((one.field, one.reason) for one in error.more)
        return Predicted(Component(row, {}, None), None, error.field, error.reason, more)


def _names_wrong(row: Row) -> Iterator[UnsupportedError]:
    """What is wrong of the cells that name things."""
    kind, metric = row["component"], row["metric"]
    if kind not in PREDICTORS:
        yield UnsupportedError("component", f"{kind!r} has no predictor")
    elif metric not in PREDICTORS[kind].metrics:
        yield UnsupportedError("metric", f"{metric!r} {not_one_of(PREDICTORS[kind].metrics)}")
    yield from complaints(lambda: machine(row["gpu"]), "gpu")


def _predict(component: Component) -> Predicted:
    predictor, hardware = PREDICTORS[component.kind], machine(component.row["gpu"])
    try:
        value = predictor.predict(component, hardware)
        return Predicted(component, value, hardware=hardware)
    except UnsupportedError as error:
        return Predicted(component, None, error.field, error.reason)
    except MopError as error:
        return Predicted(component, None, "simulator", str(error))
    except (AssertionError, ArithmeticError, LookupError, ValueError, TypeError) as error:
        return Predicted(component, None, "simulator", f"failed: {type(error).__name__} {error}")
