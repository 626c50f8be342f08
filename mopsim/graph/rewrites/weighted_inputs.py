"""Rows times the weights of their routes by torch's own operators: those that come home, or, where weights
multiply the inputs of experts, those that leave."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, beside
from mopsim.graph.tape import Kernel, Value

WEIGHTED = TensorPasses(2, 0, 1, strided=1, along=2)
WEIGHTED_BACKWARD = TensorPasses(5, 0, 3, strided=1, along=2)
"""Rows times their route weights; the gradient of the rows, and of the weights by a product and a sum."""


def weighed_first(kernel: Kernel) -> Kernel:
    """Rows times their weights before they leave. The gradients of both are made of the tokens, and of the
    rows' gradients in the order of tokens."""
    size = kernel.writes[0].bytes
    kernel = beside(kernel, size, WEIGHTED, WEIGHTED_BACKWARD)
    return replace(kernel, saves=(*kernel.saves, *kernel.reads), back_scratch=(("dispatch", size),))


def summed_at_home(kernel: Kernel, sent: int) -> Kernel:
    """Rows of `sent` bytes put in the order of their tokens and summed. The order is kept once more, with
    which what a checkpoint makes again ends."""
    again = Value("sum_order", 1, "dispatch", grad=False)
    return replace(kernel.keeping(again), scratch=(("dispatch", sent),))
