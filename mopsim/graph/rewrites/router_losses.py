"""The losses of routers that steer the gradient beside the cross entropy, under autograd."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, charged, each, made, scratch
from mopsim.graph.tape import Kernel, Value

BALANCE = TensorPasses(0, 4, 14), TensorPasses(0, 18, 11), 3
"""In passes over the scores (mopexec.model.auxiliary.router_loss under torch's dispatch, torch 2.13): a sum
of each token's, a quotient, a sum of each sequence's; of little, the counts of routes and what weighs them.
Back: three quotients, a sign, a product, two sums of gradients."""
Z = TensorPasses(0, 6, 12), TensorPasses(0, 9, 10), 2
"""Over the logits: a maximum, a difference, its exponential and a sum; of little, the square and its sum.
Back: a difference, an exponential, a product, a sum of gradients."""


def router_losses(kernels: tuple[Kernel, ...], balance: bool, z: bool, sequences: int) -> tuple[Kernel, ...]:
    """A layer's kernels with these losses of its router. The balance loss keeps the sum of each token's
    scores, the z-loss the logits and the logarithm of each token's sum; each makes a gradient of their size
    beside that of the weights. sequences: whose counts of routes their ranks add up."""
    values = made(kernels)

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if kernel.name != "top_k":
            return (kernel,)
        (product,) = (one.matmuls[0] for one in kernels if one.name == "router")
        size, found = values["scores"].bytes, [kernel]
        row = Value("scores_sum", int(size / product.n), grad=False)
        if balance:
            routes = Kernel(
                "routes", "all_reduce", kernel.component, (), (), back_bytes=0.0, group="sequence"
            )
            found.append(replace(routes, bytes=float(size / product.m * sequences)))
            found.append(_loss("balance_loss", kernel, "scores", row, size, BALANCE))
        if z:
            row = replace(row, name="logits_sum")
            found.append(_loss("z_loss", kernel, "router_logits", row, size, Z))
        return tuple(found)

    return each(kernels, change)


def _loss(
    name: str, top_k: Kernel, read: str, row: Value, size: int, loss: tuple[TensorPasses, TensorPasses, int]
) -> Kernel:
    """loss: its passes, and tensors of the size of what it reads that its backward has at once."""
    there, back, alive = loss
    first = Kernel(
        name, "memory_bound", top_k.component, (read,), (row,), saves=(read, row.name),
        scratch=scratch(size), back_scratch=alive * scratch(size),
    )  # fmt: skip
    return charged(first, there, back, 0, size)
