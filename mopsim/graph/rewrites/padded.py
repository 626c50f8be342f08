"""Rows of routed experts padded to those of the busiest one, and weights of experts that are stacked."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, beside, each, scaled
from mopsim.graph.tape import Kernel, Value


def padded_to_busiest(kernels: tuple[Kernel, ...], local: int, most: int = 0) -> tuple[Kernel, ...]:
    """Each of a rank's `local` experts computes as many rows as the busiest: in one batch of products, whose
    rows are copied into zeros and out again, expert by expert. most: rows of each that are held, if not
    these."""
    first = next((one for one in kernels if one.kind == "grouped_matmul"), None)
    if first is None or not first.matmuls:
        return kernels
    busiest, rows = max(one.m for one in first.matmuls), sum(one.m * one.count for one in first.matmuls)
    share, held = local * busiest / rows, local * (most or busiest) / rows
    busy = round(sum(one.count for one in first.matmuls if one.m))
    return tuple(_padded(one, local, share, held, busy) for one in kernels)


def rows_aligned(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Rows are copied once more after they are sorted and before they are put back; so their gradients."""
    return tuple(
        beside(one, one.writes[0].bytes, COMPOSED["copied"]) if one.name in ("sort", "unsort") else one
        for one in kernels
    )


def weights_stacked(kernels: tuple[Kernel, ...], b: int) -> tuple[Kernel, ...]:
    """Weights of experts that are parameters of their own are copied into one tensor before each product,
    which its backward reads again; the gradient of that tensor is copied back, expert by expert."""

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if kernel.kind != "grouped_matmul" or not kernel.matmuls:
            return (kernel,)
        experts = round(sum(one.count for one in kernel.matmuls))
        size = round(kernel.matmuls[0].n * kernel.matmuls[0].k * experts * b)
        whole = Value(f"{kernel.name}_stacked", size)
        copy = Kernel(
            "stack_weights", "memory_bound", kernel.component, (), (whole,), bytes=2.0 * size,
            back_bytes=2.0 * size, back_launches=experts,
        )  # fmt: skip
        reads, saves = ((*names, whole.name) for names in (kernel.reads, kernel.saves))
        return copy, replace(kernel, reads=reads, saves=saves)

    return each(kernels, change)


def _padded(kernel: Kernel, local: int, share: float, held: float, busy: int) -> Kernel:
    """share: of the rows that are computed over those that arrived; held: of those in memory."""
    found = kernel.sized(lambda one: round(one.bytes * held))
    if kernel.name in ("sort", "unsort"):
        return _sliced(kernel, found.writes, share, busy, local)
    if kernel.kind == "grouped_matmul":
        most = max(kernel.matmuls, key=lambda one: one.m)
        return replace(found, matmuls=(replace(most, count=local),))
    if kernel.component != "experts" or not kernel.name.startswith("experts_"):
        return kernel
    scratch, back_scratch = (scaled(one, held) for one in (kernel.scratch, kernel.back_scratch))
    return replace(found.moving(share), scratch=scratch, back_scratch=back_scratch)


def _sliced(kernel: Kernel, writes: tuple[Value, ...], share: float, busy: int, local: int) -> Kernel:
    """Zeros, then the rows of each of the `busy` experts copied from slice to slice. In the backward of torch
    a slice that was written copies the whole gradient, and one that was read makes a whole one of zeros and
    adds it to that of the others (CopySlices, slice_backward, select_backward and add, counted by a dispatch
    mode on a CPU, torch 2.13)."""
    rows = kernel.bytes / 2
    padded = rows * share
    into = kernel.name == "sort"
    if into:
        back = 2 * busy * padded + (4 * busy + 2) * rows
    else:
        back = (4 * busy - 3 + 3 * (busy - 1) / local) * padded + (2 * busy + 5) * rows
    return replace(
        kernel, writes=writes if into else kernel.writes, indexed=False, launches=1 + busy,
        bytes=kernel.bytes + (padded if into else rows), back_bytes=back,
        back_launches=(7 if into else 8) * busy,
    )  # fmt: skip
