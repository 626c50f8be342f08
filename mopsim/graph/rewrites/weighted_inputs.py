"""Rows times the weights of their routes by torch's own operators: those that come home, or, where weights
multiply the inputs of experts, those that leave."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, beside, charged, each, made, scratch
from mopsim.graph.tape import Kernel, Value


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
    weighed = COMPOSED["weighted_arrived" if how == "rows" else "weighted_sent"]

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if target not in kernel.writes:
            return (kernel,)
        writes = tuple(came if one is target else one for one in kernel.writes)
        return replace(kernel, writes=writes), charged(weigh, weighed, target.bytes, wide)

    return each(kernels, change)


def weighed_first(kernel: Kernel) -> Kernel:
    """Rows times their weights before they leave. The gradients of both are made of the tokens, and of the
    rows' gradients in the order of tokens."""
    size = kernel.writes[0].bytes
    kernel = beside(kernel, size, COMPOSED["weighted"])
    return replace(kernel, saves=(*kernel.saves, *kernel.reads), back_scratch=(("dispatch", size),))


def summed_at_home(kernel: Kernel, sent: int) -> tuple[Kernel, Kernel]:
    """Rows of `sent` bytes put in the order of their tokens and summed. The order is kept once more, with
    which what a checkpoint makes again ends."""
    again = Value("sum_order", 1, "dispatch", grad=False)
    kept = Kernel("order_kept", "view", kernel.component, (), (again,), saves=(again.name,))
    return replace(kernel, scratch=(("dispatch", sent),)), kept
