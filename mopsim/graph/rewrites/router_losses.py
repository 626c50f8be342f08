"""The losses of routers that steer the gradient beside the cross entropy, under autograd."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, scratch, traffic
from mopsim.graph.tape import Kernel, Value

BALANCE, BALANCE_BACKWARD = TensorPasses(0, 4, 14), TensorPasses(0, 18, 11)
"""In passes over the scores (mopexec.model.auxiliary.router_loss under torch's dispatch, torch 2.13): a sum
of each token's, a quotient, a sum of each sequence's; of little, the counts of routes and what weighs them.
Back: three quotients, a sign, a product, two sums of gradients."""
Z, Z_BACKWARD = TensorPasses(0, 6, 12), TensorPasses(0, 9, 10)
"""Over the logits: a maximum, a difference, its exponential and a sum; of little, the square and its sum.
Back: a difference, an exponential, a product, a sum of gradients."""


def router_losses(kernels: tuple[Kernel, ...], balance: bool, z: bool, sequences: int) -> tuple[Kernel, ...]:
    """A layer's kernels with these losses of its router. The balance loss keeps the sum of each token's
    scores, the z-loss the logits and the logarithm of each token's sum; each makes a gradient of their size
    beside that of the weights. sequences: whose counts of routes their ranks add up."""
    found: list[Kernel] = []
    for kernel in kernels:
        found.append(kernel)
        if kernel.name != "top_k":
            continue
        made = {value.name: value for one in found for value in one.writes}
        (product,) = (one for one in found if one.name == "router")
        size, tokens, experts = made["scores"].bytes, product.matmuls[0].m, product.matmuls[0].n
        row = Value("scores_sum", int(size / experts), grad=False)
        if balance:
            counts = float(size / tokens * sequences)
            found.append(
                Kernel(
                    "routes",
                    "all_reduce",
                    kernel.component,
                    (),
                    (),
                    bytes=counts,
                    back_bytes=0.0,
                    group="sequence",
                )
            )
            found.append(_loss("balance_loss", kernel, "scores", row, size, BALANCE, BALANCE_BACKWARD, 3))
        if z:
            row = replace(row, name="logits_sum")
            found.append(_loss("z_loss", kernel, "router_logits", row, size, Z, Z_BACKWARD, 2))
    return tuple(found)


def _loss(
    name: str,
    top_k: Kernel,
    read: str,
    row: Value,
    size: int,
    there: TensorPasses,
    back: TensorPasses,
    alive: int,
) -> Kernel:
    """alive: tensors of the size of what it reads that its backward has at once."""
    return Kernel(
        name, "memory_bound", top_k.component, (read,), (row,), saves=(read, row.name),
        bytes=traffic(there, 0, size), launches=there.launches, back_bytes=traffic(back, 0, size),
        back_launches=back.launches, scratch=scratch(size), back_scratch=alive * scratch(size),
    )  # fmt: skip
