"""Attention sinks that a program applies after the attention's kernel."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, charged
from mopsim.graph.tape import Kernel


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
    how = COMPOSED["sinks_compiled" if compiled else "sinks"]
    after = (one.renamed(lambda name: "o_scaled" if name == "o" else name) for one in kernels[place + 1 :])
    return (*kernels[: place + 1], charged(sinks, how, core.writes[0].bytes), *after)
