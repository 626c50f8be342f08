"""Hides: communication that a program hides where a strategy does not say."""

from typing import Literal

from msgspec.structs import replace

from mopsim.common.io import Spec
from mopsim.spec.strategy import Strategy


class Hides(Spec, frozen=True, kw_only=True):
    """Communication that the program hides by default, where a strategy does not say: see Overlap.

    grad_reduce: reductions of gradients. `zero3`: those of ZeRO-3 alone.
    param_gather: gathers of updated parameters.
    pipeline: sends between stages. `interleaved`: those of interleaved stages alone.
    tensor: exchanges of tensor-parallel regions.
    experts: dispatch and combine of experts.
    """

    grad_reduce: bool | Literal["zero3"] = False
    param_gather: bool = False
    pipeline: bool | Literal["interleaved"] = False
    tensor: bool = False
    experts: bool = False

    def of(self, strategy: Strategy) -> "Hides":
        """What is hidden of a strategy."""
        found = self
        if self.grad_reduce == "zero3":
            found = replace(found, grad_reduce=strategy.dense.zero == 3)
        if self.pipeline == "interleaved":
            found = replace(found, pipeline=strategy.pipeline.virtual_stages > 1)
        return found
