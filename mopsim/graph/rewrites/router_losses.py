"""The losses of routers that steer the gradient beside the cross entropy, under autograd."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, charged, each, made, scratch
from mopsim.graph.tape import Kernel, Value


def router_losses(kernels: tuple[Kernel, ...], balance: bool, z: bool, sequences: int) -> tuple[Kernel, ...]:
    """A layer's kernels with these losses of its router. The balance loss keeps the sum of each token's
    scores, the z-loss the logits and the logarithm of each token's sum; each makes a gradient of their size
    beside that of the weights. sequences: whose counts of routes their ranks add up."""
    values = made(kernels)

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        (product,) = (one.matmuls[0] for one in kernels if one.name == "router")
        size, found = values["scores"].bytes, [kernel]
        row = Value("scores_sum", int(size / product.n), grad=False)
        if balance:
            routes = Kernel(
                "routes", "all_reduce", kernel.component, (), (), back_bytes=0.0, group="sequence"
            )
            found.append(replace(routes, bytes=float(size / product.m * sequences)))
            found.append(_loss("balance_loss", kernel, "scores", row, size))
        if z:
            row = replace(row, name="logits_sum")
            found.append(_loss("z_loss", kernel, "router_logits", row, size))
        return tuple(found)

    return each(kernels, change, "top_k")


def _loss(name: str, top_k: Kernel, read: str, row: Value, size: int) -> Kernel:
    """size: of what it reads, as large as which its backward has some at once."""
    how = COMPOSED[name]
    first = Kernel(
        name, "memory_bound", top_k.component, (read,), (row,), saves=(read, row.name),
        scratch=scratch(size), back_scratch=int(how.back_working[1]) * scratch(size),
    )  # fmt: skip
    return charged(first, how, 0, size)
