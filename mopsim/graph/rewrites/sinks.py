"""Attention sinks that a program applies after the attention's kernel."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, charged
from mopsim.graph.tape import Kernel

SCALED, SCALED_BACKWARD = TensorPasses(2, 0, 1), TensorPasses(3, 0, 1)
SCALED_EACH = TensorPasses(2, 0, 4, strided=1, along=2)
SCALED_EACH_BACKWARD = TensorPasses(6, 0, 4, strided=1, along=2)
"""The output times a number of each row and head. Back, in one kernel: the gradient of the output, and of
these numbers from both; or as a product, another, its sum."""


def sinks_apart(kernels: tuple[Kernel, ...], compiled: bool) -> tuple[Kernel, ...]:
    """The kernels, in which what attention has found is scaled by how much of it its sinks leave (the sigmoid
    of the log-sum-exp less the sink). The attention's backward keeps what it found, the products after it
    what came of that."""
    place = next((i for i, one in enumerate(kernels) if one.name == "attention_core"), None)
    if place is None:
        return kernels
    core = kernels[place]
    sinks = Kernel(
        "sinks", "memory_bound", core.component, ("o",), (replace(core.writes[0], name="o_scaled"),),
        saves=("o",),
    )  # fmt: skip
    passes = (SCALED, SCALED_BACKWARD) if compiled else (SCALED_EACH, SCALED_EACH_BACKWARD)
    after = (one.renamed(lambda name: "o_scaled" if name == "o" else name) for one in kernels[place + 1 :])
    return (*kernels[: place + 1], charged(sinks, *passes, core.writes[0].bytes), *after)
