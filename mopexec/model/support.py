"""Which model specs the executor can run; the others are refused by name."""

from mopsim.spec.model import ModelSpec
from mopsim.spec.support import unsupported_model


def check_model(spec: ModelSpec) -> None:
    """Raise SpecError naming the first field of `spec` that the executor does not run."""
    for refusal in unsupported_model(spec):
        raise refusal
