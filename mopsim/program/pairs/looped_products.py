"""What products of one expert after the other hold, in tensors of its rows and its width."""

from typing import NamedTuple

from mopsim.spec.model import ModelSpec


class LoopedProducts(NamedTuple):
    """forward: at most. backward: beside the product that a route weight's gradient is summed over.
    activation: at most in the activation's backward (mopexec/operators/looped_products.py, swiglu.py)."""

    forward: int
    backward: int
    activation: int

    @classmethod
    def of(cls, model: ModelSpec) -> "LoopedProducts":
        if model.ffn_matrices == 2:
            return cls(1, 3, 0)
        return cls(4, 4, 7) if model.swiglu_limit else cls(2, 5, 0)
