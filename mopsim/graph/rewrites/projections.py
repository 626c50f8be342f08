"""Passes beside a joint projection, whose parts torch splits."""

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
