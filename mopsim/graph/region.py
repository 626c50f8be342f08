"""Tensor-parallel regions: what begins and ends the products that the ranks of a group split."""

from collections.abc import Callable

from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Value


def gather(name: str, source: str, out: Value, component: str, group: str = "tensor") -> Kernel:
    """A region begins: rows of all its ranks (sequence parallelism, arXiv 2205.05198).

    Only the local rows are kept; the backward gathers them again for the weight gradient, and scatters the
    sum of the input gradients.
    """
    return Kernel(
        name, "all_gather", component, (source,), (out,), bytes=float(out.bytes), group=group,
        back_kind="reduce_scatter",
    )  # fmt: skip


def scatter(name: str, source: str, out: Value, size: int, component: str, group: str = "tensor") -> Kernel:
    """A region ends: partial sums of `size` bytes are added, each rank keeps its rows."""
    return Kernel(
        name, "reduce_scatter", component, (source,), (out,), bytes=float(size), group=group,
        back_kind="all_gather",
    )  # fmt: skip


def begin(
    name: str, source: str, width: int, component: str, shapes: Shapes
) -> tuple[tuple[Kernel, ...], str]:
    """What begins a region at `source` [N,width], and the name of what its products read.

    Without sequence parallelism every rank holds all rows: the sum of the input gradients is all that
    travels, in place (arXiv 1909.08053, f).
    """
    if shapes.tensor == 1:
        return (), source
    size = shapes.region_tokens * width * shapes.width
    if shapes.sequence_parallel:
        whole = Value(f"{source}g", size)
        return (gather(name, source, whole, component),), whole.name
    kernel = Kernel(name, "all_reduce", component, (source,), (), back_bytes=float(size), group="tensor")
    return (kernel,), source


def end(
    name: str, product: Callable[[Value], Kernel], out: Value, component: str, shapes: Shapes
) -> tuple[Kernel, ...]:
    """A product that ends a region, and what sums its parts into `out`: rows of this rank, or in place all
    of them where no rows are split (arXiv 1909.08053, g)."""
    if shapes.tensor == 1:
        return (product(out),)
    if not shapes.sequence_parallel:
        total = Kernel(
            name, "all_reduce", component, (out.name,), (), bytes=float(out.bytes), back_bytes=0.0,
            group="tensor",
        )  # fmt: skip
        return product(out), total
    partial = Value(f"{out.name}p", out.bytes * shapes.tensor)
    return product(partial), scatter(name, partial.name, out, partial.bytes, component)
