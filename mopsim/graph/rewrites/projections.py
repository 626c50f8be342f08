"""Passes beside a joint projection: of its parts where torch splits it, of its input's gradients where it
stands for several."""

from mopsim.graph.rewrites.eager import SUM
from mopsim.graph.tape import Kernel


def split(kernels: tuple[Kernel, ...], copied: bool) -> tuple[Kernel, ...]:
    """Queries, keys and values as torch splits them from one projection, whose gradient is put together from
    theirs. copied: values, and queries that share keys, are made contiguous for the attention kernel, unless
    it reads the projection as it lies."""
    joint = next((kernel for kernel in kernels if kernel.name == "qkv_proj"), None)
    if joint is None:
        return kernels
    q, k, v = joint.writes[:3]
    if copied and any(kernel.name == "attention_core" and q.name in kernel.reads for kernel in kernels):
        return kernels
    shared = q.bytes != k.bytes
    parts = Kernel(
        "qkv_split", "memory_bound", joint.component, (v.name,), (),
        bytes=2.0 * (v.bytes + shared * q.bytes) * copied, launches=(1 + shared) * copied,
        back_bytes=2.0 * (q.bytes + k.bytes + v.bytes), back_launches=1,
    )  # fmt: skip
    place = kernels.index(joint) + 1
    return (*kernels[:place], parts, *kernels[place:])


def parts_added(kernels: tuple[Kernel, ...], wings: int, eager: bool) -> tuple[Kernel, ...]:
    """Products counted as one that are several of one input, whose gradients are added: one after the other
    by eager torch, in one kernel by a compiler."""
    if all(kernel.name != "qkv_proj" for kernel in kernels):
        return kernels
    sizes = {value.name: value.bytes for kernel in kernels for value in kernel.writes}
    found: list[Kernel] = []
    for kernel in kernels:
        parts = {"qkv_proj": 3, "up_proj": wings}.get(kernel.name, 1)
        source = kernel.reads[0] if parts > 1 else ""
        if source in sizes:
            passes = SUM.narrow * (parts - 1) if eager else parts + 1
            found.append(
                Kernel(
                    f"{kernel.name}_sum", "memory_bound", kernel.component, (source,), (), launches=0,
                    back_bytes=float(passes * sizes[source]), back_launches=parts - 1 if eager else 1,
                )
            )  # fmt: skip
        found.append(kernel)
    return tuple(found)
