"""Biases of routed experts, which torch adds to their rows beside the products."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import COMPOSED, charged, each, scratch
from mopsim.graph.tape import Kernel

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
        name = f"biased{'_indexed' * (how == 'indexed')}{'_compiled' * compiled}"
        return kernel, charged(bias, COMPOSED[name], float(out.bytes))

    return each(kernels, change)


def bias_scaled(kernels: tuple[Kernel, ...], wider: float) -> tuple[Kernel, ...]:
    """What leaves the experts with their bias added by torch, expert by expert, times the rows' route weights
    (Megatron-Core's TEGroupedMLP). wider: a route weight's bytes by those of the compute dtype."""
    how = COMPOSED["bias_scaled_wide" if wider > 1 else "bias_scaled"]

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        if kernel.name != "experts_down" or not kernel.matmuls:
            return (kernel,)
        out, experts = kernel.writes[0], sum(int(one.count) for one in kernel.matmuls)
        wide = out.bytes * wider
        bias = Kernel(
            f"{kernel.name}_bias", "memory_bound", kernel.component, (out.name,), (),
            scratch=scratch(2 * wide), back_scratch=scratch(2 * wide),
        )  # fmt: skip
        there, back = (
            passes.launches + own * experts
            for passes, own in zip((how.forward, how.backward), how.of_each, strict=True)
        )
        bias = replace(charged(bias, how, out.bytes, wide), launches=there, back_launches=back)
        return kernel, bias

    return each(kernels, change)
