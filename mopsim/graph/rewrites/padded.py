"""Rows of routed experts padded to those of the busiest one."""

from msgspec.structs import replace

from mopsim.graph.tape import Kernel, Matmul, Step


def padded_to_busiest(kernels: tuple[Kernel, ...], local: int, most: int = 0) -> tuple[Kernel, ...]:
    """Each of a rank's `local` experts computes as many rows as the busiest: in one batch of products, whose
    rows are copied into zeros and out again. most: rows of each that are held, if not these."""
    first = next((one for one in kernels if one.kind == "grouped_matmul"), None)
    if first is None or not first.matmuls:
        return kernels
    busiest, rows = max(one.m for one in first.matmuls), _rows(first)
    return tuple(
        _padded(one, local, local * busiest / rows, local * (most or busiest) / rows) for one in kernels
    )


def _rows(kernel: Kernel) -> float:
    return sum(one.m * one.count for one in kernel.matmuls)


def _padded(kernel: Kernel, local: int, share: float, held: float) -> Kernel:
    """share: of the rows that are computed over those that arrived; held: of those in memory."""

    def steps(given: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple((category, round(size * held)) for category, size in given)

    writes = tuple(replace(one, bytes=round(one.bytes * held)) for one in kernel.writes)
    if kernel.name == "sort":  # zeros at the padded size, then the rows, read and written
        moved = kernel.bytes * (1 + share / 2)
        return replace(kernel, writes=writes, bytes=moved, back_bytes=moved)
    if kernel.kind == "grouped_matmul":
        most = max(kernel.matmuls, key=lambda one: one.m)
        return replace(kernel, writes=writes, matmuls=(Matmul(most.m, most.n, most.k, local),))
    if kernel.component != "experts" or not kernel.name.startswith("experts_"):
        return kernel
    back = None if kernel.back_bytes is None else kernel.back_bytes * share
    scratch, back_scratch = steps(kernel.scratch), steps(kernel.back_scratch)
    return replace(
        kernel, writes=writes, bytes=kernel.bytes * share, back_bytes=back, scratch=scratch,
        back_scratch=back_scratch,
    )  # fmt: skip
