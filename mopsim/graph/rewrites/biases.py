"""Biases of routed experts, which torch adds to their rows beside the products."""

from mopsim.graph.rewrites.tensor_passes import TensorPasses, scratch, traffic
from mopsim.graph.tape import Kernel

BIASED = TensorPasses(4, 0, 2)
"""An expert's bias gathered for each row; rows and biases read, their sums written."""
SCALED, SCALED_BACKWARD = TensorPasses(6, 0, 1), TensorPasses(8, 0, 1)
SCALED_WIDE, SCALED_WIDE_BACKWARD = TensorPasses(2, 6, 2), TensorPasses(4, 8, 2)
"""An expert's bias times its rows' route weights, added to its rows; the experts' put together. Back: a
product and a sum for either of bias and weights; the rows' of all experts put together. Wide, weights are in
fp32: what is put together is cast, as are all gradients. Kernels beside those of each expert."""
SCALED_EACH, SCALED_WIDE_EACH = (2, 4), (2, 6)
"""Kernels of each expert in that, forward and backward."""
BULK_ROW = 0.0089
"""A row that a bulk reduction (torch 2.14) adds to the same row as those beside it, in rows of index_put_, of
1.04 us each (cost/ rates.yaml): 3.89 of 7.77 million rows of 1 to 4 KB that go to one row keep B200 34.3 to
39.5 ms (pytorch pull request 183950). Sorted by expert, nearly all rows in flight are of one."""


def biased(kernels: tuple[Kernel, ...], how: str, b: int, compiled: bool) -> tuple[Kernel, ...]:
    """Products of experts with their bias gathered for every row and added, by what follows where it is
    compiled. Its gradient: one product over the rows' gradients, or, `indexed`, torch's index_put_, which
    adds an expert's rows one after the other, or, `added`, its index_add_, by atomic operations, or, `bulk`,
    by bulk reductions."""
    found: list[Kernel] = []
    for kernel in kernels:
        found.append(kernel)
        if not kernel.name.startswith("experts_") or not kernel.matmuls:
            continue
        out = kernel.writes[0]
        most = max((one.m for one in kernel.matmuls), default=0.0)
        rows = {"indexed": most, "bulk": BULK_ROW * sum(one.m * one.count for one in kernel.matmuls)}
        found.append(
            Kernel(
                f"{kernel.name}_bias", "memory_bound", kernel.component, (out.name,), (),
                bytes=0.0 if compiled else float(BIASED.narrow * out.bytes),
                launches=0 if compiled else BIASED.launches, back_bytes=float(out.bytes),
                back_launches=5 if how == "indexed" else 2, back_serial=rows.get(how, 0.0),
                back_sums=out.bytes / b if how == "added" else 0.0,
                scratch=scratch(0 if compiled else out.bytes),
            )
        )  # fmt: skip
    return tuple(found)


def bias_scaled(kernels: tuple[Kernel, ...], wider: float) -> tuple[Kernel, ...]:
    """What leaves the experts with their bias added by torch, expert by expert, times the rows' route weights
    (Megatron-Core's TEGroupedMLP). wider: a route weight's bytes by those of the compute dtype."""
    there, back, each = SCALED, SCALED_BACKWARD, SCALED_EACH
    if wider > 1:
        there, back, each = SCALED_WIDE, SCALED_WIDE_BACKWARD, SCALED_WIDE_EACH
    found: list[Kernel] = []
    for kernel in kernels:
        found.append(kernel)
        if kernel.name != "experts_down" or not kernel.matmuls:
            continue
        out, experts = kernel.writes[0], sum(int(one.count) for one in kernel.matmuls)
        wide = out.bytes * wider
        found.append(
            Kernel(
                f"{kernel.name}_bias", "memory_bound", kernel.component, (out.name,), (),
                bytes=traffic(there, out.bytes, wide), launches=each[0] * experts + there.launches,
                back_bytes=traffic(back, out.bytes, wide), back_launches=each[1] * experts + back.launches,
                scratch=scratch(2 * wide), back_scratch=scratch(2 * wide),
            )
        )  # fmt: skip
    return tuple(found)
