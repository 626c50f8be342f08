"""Dense FFN and shared experts over slices of their rows, one after the other, each recomputed in its own
backward (TiledMLP of arXiv 2506.13996; mopexec.operators.ffn)."""

from msgspec.structs import replace

from mopsim.graph.tape import Kernel
from mopsim.spec.layout import ceil_div

_PARTS = ("dense_ffn", "shared_experts")


def in_slices(kernels: tuple[Kernel, ...], rows: int, largest: int) -> tuple[Kernel, ...]:
    """A layer's kernels, the feed-forward's over slices of `largest` of the `rows` rows: what is made between
    its input and its output has the size of one slice."""
    count = ceil_div(rows, largest)

    def sliced(kernel: Kernel) -> Kernel:
        if kernel.component not in _PARTS or kernel.name.endswith(("norm", "residual")):
            return kernel
        inner = kernel.name != "down_proj"
        back = None if kernel.back_launches is None else kernel.back_launches * count
        return replace(
            kernel.sized(lambda one: ceil_div(one.bytes, count) if inner else one.bytes),
            region="slices" if count > 1 else "", launches=kernel.launches * count, back_launches=back,
            matmuls=tuple(replace(one, m=one.m / count, count=one.count * count) for one in kernel.matmuls),
        )  # fmt: skip

    return tuple(sliced(kernel) for kernel in kernels)
