"""Biases of routed experts, which torch adds to their rows beside the products."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, charged, each, scratch
from mopsim.graph.tape import Kernel

BIASED, NOTHING = TensorPasses(4, 0, 2), TensorPasses(0, 0, 0)
"""An expert's bias gathered for each row; rows and biases read, their sums written."""
BIASED_BACKWARD, INDEXED_BACKWARD = TensorPasses(1, 0, 2), TensorPasses(1, 0, 5)
SCALED = TensorPasses(6, 0, 1, strided=1, along=1)
SCALED_BACKWARD = TensorPasses(8, 0, 1, strided=2, along=4)
SCALED_WIDE = TensorPasses(2, 6, 2, strided=1, along_wide=1)
SCALED_WIDE_BACKWARD = TensorPasses(4, 8, 2, strided=2, along_wide=4)
"""An expert's bias times its rows' route weights, added to its rows; the experts' put together. Back: a
product and a sum for either of bias and weights; the rows' of all experts put together. Wide, weights are in
fp32: what is put together is cast, as are all gradients. Products of rows and a number of each, or of rows
and one, follow strides. Kernels beside those of each expert."""
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

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if not kernel.name.startswith("experts_") or not kernel.matmuls:
            return (kernel,)
        out = kernel.writes[0]
        rows = {
            "indexed": max(one.m for one in kernel.matmuls),
            "bulk": BULK_ROW * sum(one.m * one.count for one in kernel.matmuls),
        }
        bias = Kernel(
            f"{kernel.name}_bias", "memory_bound", kernel.component, (out.name,), (),
            back_serial=rows.get(how, 0.0), back_sums=out.bytes / b if how == "added" else 0.0,
            scratch=scratch(0 if compiled else out.bytes),
        )  # fmt: skip
        back = INDEXED_BACKWARD if how == "indexed" else BIASED_BACKWARD
        return kernel, charged(bias, NOTHING if compiled else BIASED, back, float(out.bytes))

    return each(kernels, change)


def bias_scaled(kernels: tuple[Kernel, ...], wider: float) -> tuple[Kernel, ...]:
    """What leaves the experts with their bias added by torch, expert by expert, times the rows' route weights
    (Megatron-Core's TEGroupedMLP). wider: a route weight's bytes by those of the compute dtype."""
    there, back, own = SCALED, SCALED_BACKWARD, SCALED_EACH
    if wider > 1:
        there, back, own = SCALED_WIDE, SCALED_WIDE_BACKWARD, SCALED_WIDE_EACH

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if kernel.name != "experts_down" or not kernel.matmuls:
            return (kernel,)
        out, experts = kernel.writes[0], sum(int(one.count) for one in kernel.matmuls)
        wide = out.bytes * wider
        bias = Kernel(
            f"{kernel.name}_bias", "memory_bound", kernel.component, (out.name,), (),
            scratch=scratch(2 * wide), back_scratch=scratch(2 * wide),
        )  # fmt: skip
        bias = charged(bias, there, back, out.bytes, wide)
        starts = (bias.launches + own[0] * experts, back.launches + own[1] * experts)
        return kernel, replace(bias, launches=starts[0], back_launches=starts[1])

    return each(kernels, change)
