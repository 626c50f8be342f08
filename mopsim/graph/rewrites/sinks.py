"""Attention sinks that a program applies after the attention's kernel."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, traffic
from mopsim.graph.tape import Kernel

SCALED, SCALED_BACKWARD, SCALED_EACH = TensorPasses(2, 0, 1), TensorPasses(3, 0, 1), TensorPasses(6, 0, 4)
"""The output times a number of each row and head. Back, in one kernel: the gradient of the output, and of
these numbers from both; or as a product, another, its sum."""


def sinks_apart(kernels: tuple[Kernel, ...], compiled: bool) -> tuple[Kernel, ...]:
    """The kernels, in which what attention has found is scaled by how much of it its sinks leave (the sigmoid
    of the log-sum-exp less the sink). The attention's backward keeps what it found, the products after it
    what came of that."""
    found: list[Kernel] = []
    apart = False
    for kernel in kernels:
        if apart:
            reads, saves = (
                tuple("o_scaled" if name == "o" else name for name in names)
                for names in (kernel.reads, kernel.saves)
            )
            kernel = replace(kernel, reads=reads, saves=saves)
        found.append(kernel)
        if kernel.name == "attention_core":
            apart, out = True, kernel.writes[0]
            back = SCALED_BACKWARD if compiled else SCALED_EACH
            found.append(
                Kernel(
                    "sinks", "memory_bound", kernel.component, ("o",), (replace(out, name="o_scaled"),),
                    saves=("o",), bytes=traffic(SCALED, out.bytes, 0), launches=1 if compiled else 4,
                    back_bytes=traffic(back, out.bytes, 0), back_launches=back.launches,
                )
            )  # fmt: skip
    return tuple(found)
