"""Gated activations that no kernel fuses."""

from msgspec import structs

from mopsim.graph.rewrites.tensor_passes import COMPOSED, charged, each, made
from mopsim.graph.tape import GATE_CLAMPS, Kernel


def gated_within(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The first product of routed experts ends in the gate and in the cast of the second's input, the
    second's backward in the gate's and in the cast of its gradient (Transformer Engine 2.14 to 2.18,
    ops/fused, grouped_mlp: what is in MXFP8, from one kernel each)."""
    changes: dict[str, dict[str, object]] = {
        "experts_up": {"back_casts": False}, "experts_down": {"casts": False},
        "experts_act": {"kind": "view", "bytes": 0.0, "back_bytes": 0.0, "launches": 0, "back_launches": 0},
    }  # fmt: skip
    return tuple(structs.replace(one, **changes.get(one.name, {})) for one in kernels)


def clamps_apart(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The clamps keep gate and up, the gate both clamped."""
    values = made(kernels)

    def change(kernel: Kernel) -> tuple[Kernel, ...]:
        sources, half = kernel.reads, kernel.writes[0].bytes
        names = tuple(f"{name}_clamped" for name in sources)
        new = tuple(structs.replace(values[old], name=name) for old, name in zip(sources, names, strict=True))
        first = Kernel(GATE_CLAMPS, "memory_bound", kernel.component, sources, new, saves=sources)
        first = charged(first, COMPOSED["clamps"], float(half))
        return first, structs.replace(kernel, reads=names, saves=names)

    return each(kernels, change, "experts_act")
