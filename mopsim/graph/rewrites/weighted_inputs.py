"""Rows times the weights of their routes by torch's own operators: those that come home, or, where weights
multiply the inputs of experts, those that leave."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, beside, charged, each, made, scratch
from mopsim.graph.tape import Kernel, Value

WEIGHTED = TensorPasses(2, 0, 1, strided=1, along=2)
WEIGHTED_BACKWARD = TensorPasses(5, 0, 3, strided=1, along=2)
"""Rows times their route weights; the gradient of the rows, and of the weights by a product and a sum."""

ARRIVED = TensorPasses(2, 2, 2, strided=1, along=1, along_wide=1)
ARRIVED_BACKWARD = TensorPasses(3, 7, 5, strided=1, along_wide=2)
"""Rows times weights in fp32, cast back. Back: a cast, both gradients' products, a sum, a cast."""
SENT = TensorPasses(2, 4, 3, strided=1, along_wide=2)
SENT_BACKWARD = TensorPasses(2, 8, 5, strided=1, along_wide=2)
"""The same of a copy of the rows in fp32."""


def weighed_apart(kernels: tuple[Kernel, ...], how: str, wider: float) -> tuple[Kernel, ...]:
    """Rows times their weights by operators between those that move them (Kernels.weighted_inputs). `rows`:
    where they arrived, kept as they came. `wide`: before they leave, kept in fp32. wider: an element of that
    over one in the compute dtype."""
    if not any(kernel.name == "permute" and "weight" in kernel.reads for kernel in kernels):
        return kernels
    sent = next(one.writes[0].name for one in kernels if one.name == "permute")
    target = made(kernels)["rows" if how == "rows" else sent]
    came, wide = replace(target, name=f"{target.name}_came"), int(target.bytes * wider)
    copy = replace(target, name=f"{target.name}_wide", bytes=wide, grad=False)
    kept = (came.name, "weight") if how == "rows" else ("weight",)
    weigh = Kernel(
        "weigh_inputs", "memory_bound", "experts", (came.name,), (target,), saves=kept,
        scratch=scratch(wide), back_scratch=scratch(2 * wide),
    )  # fmt: skip
    weigh = weigh if how == "rows" else weigh.keeping(copy)
    passes = (ARRIVED, ARRIVED_BACKWARD) if how == "rows" else (SENT, SENT_BACKWARD)

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if target not in kernel.writes:
            return (kernel,)
        writes = tuple(came if one is target else one for one in kernel.writes)
        return replace(kernel, writes=writes), charged(weigh, *passes, target.bytes, wide)

    return each(kernels, change)


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
