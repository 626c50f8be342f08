"""Which model specs the executor can run; the others are refused by name."""

from mopsim.spec.capability import model_refusals
from mopsim.spec.model import ModelSpec


def check_model(spec: ModelSpec) -> None:
    """Raise SpecError naming the first field of `spec` that the executor does not run."""
    for refusal in model_refusals(spec):
        raise refusal
