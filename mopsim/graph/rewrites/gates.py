"""Gated activations that no kernel fuses."""

from dataclasses import replace

from msgspec import structs

from mopsim.graph.rewrites.tensor_passes import JOINED, ComposedKernel, TensorPasses, charged, each, made
from mopsim.graph.tape import GATE_CLAMPS, Kernel


def _halves(*names: str) -> tuple[tuple[str, float, float], ...]:
    """Tensors as large as the output."""
    return tuple((name, 1.0, 0.0) for name in names)


GATED = ComposedKernel(TensorPasses(5, 0, 2), TensorPasses(9, 0, 3), _halves("silu"), gated=True)
"""SiLU and a product; two products and SiLU's backward. Keeps the result of SiLU beside what it reads."""
STRIDED = ComposedKernel(
    TensorPasses(5, 0, 2, strided=2, along=5), TensorPasses(13, 0, 4, strided=2 + 2 * JOINED, along=10),
    _halves("silu"), gated=True,
)  # fmt: skip
"""The same of halves of one tensor, whose gradients are put together: all but the product of the gradient
and what SiLU gave follow strides."""
TANH = replace(
    GATED,
    ungated=ComposedKernel(
        TensorPasses(18, 0, 8), TensorPasses(28, 0, 11), _halves("tanh", "half", "sum"), whole=True
    ),
)
TANH_WIDE = replace(
    GATED,
    ungated=ComposedKernel(
        TensorPasses(6, 16, 10), TensorPasses(13, 23, 15),
        (("exact", 0.0, 1.0), ("tanh", 0.0, 1.0), ("half", 1.0, 0.0), ("sum", 0.0, 1.0)), whole=False,
    ),
)  # fmt: skip
"""GELU's tanh form as transformers' NewGELUActivation writes it: a cube, its scale, a sum, a scale, tanh, one
more, half of the input, their product; back each's gradient, and three of the input added. Of an element in
bf16 10 bytes are kept with the result, 16 under autocast, which cubes in fp32 and leaves it so
(torch.autograd.graph.saved_tensors_hooks, torch 2.13)."""
ACTIVATIONS = {"composed": GATED, "strided": STRIDED, "tanh": TANH, "tanh_wide": TANH_WIDE}
"""By Kernels.activation."""
CLAMPED = ComposedKernel(
    TensorPasses(18, 0, 7, strided=2, along=6), TensorPasses(50, 0, 18, strided=7, along=18.5),
    _halves("gate", "sigmoid", "glu", "up"), gradients="dispatch",
)  # fmt: skip
"""gpt-oss's gate (transformers, modeling_gpt_oss.py): every second column of one tensor clamped, twice, a
scale, a sigmoid, two products and a shift. Back: two gradients of each product, one of the sigmoid and of the
scale, their sum, a mask of each clamp, and each half written into zeros of the whole and added. Keeps the
gate clamped, its sigmoid, their product and the shifted other half. Back, the halves' gradients lie in two
tensors of the whole before they are added. Clamps, masks, what these let pass and what is written into zeros
follow strides."""
CLAMPED_AGAIN = replace(CLAMPED, keeps=(), gradients="activations")
"""Keeps what it reads alone; the backward makes the rest again, beside the halves' gradients."""
CLAMPS = TensorPasses(8, 0, 4, strided=2 + 2 * JOINED, along=8)
CLAMPS_BACKWARD = TensorPasses(15, 0, 9, strided=5 + 2 * JOINED, along=13.5)
"""Megatron-Core's experts (fused_bias_geglu.py, weighted_bias_quick_geglu_impl): halves clamped and put
together, in passes over one of them, before the compiled gate; and the shift as a tensor, whose copy to the
device the host waits for. Back: a mask of each bound, both of the second half's at once, what they let pass,
put together."""
UNGATED = ComposedKernel(
    TensorPasses(4, 0, 2, strided=1, along=2), TensorPasses(9, 0, 4, strided=1, along=2), _halves("act")
)
"""Megatron-Core's experts without bias_activation_fusion and without a gate: GELU and a product by weights,
which are as narrow as the rows unless the router is asked for fp32 (core_v0.14.0, experts.py, TEGroupedMLP,
and moe_utils.py). Back: two gradients, of which one is summed, and GELU's. Keeps what is weighed."""
SHIFTED = ComposedKernel(
    TensorPasses(9, 2, 5, strided=3, along=4, along_wide=2),
    TensorPasses(16, 7, 9, strided=2 + 2 * JOINED, along=7, along_wide=2),
    _halves("silu", "shifted", "glu"), gated=True, ungated=UNGATED,
)  # fmt: skip
"""The same with one: SiLU, a shift of the other half, a product, one by weights in fp32, a cast. Back: a
cast, two gradients, a cast, a sum, two more, SiLU's, halves put together. Keeps the result of SiLU, the other
half shifted, if by nothing, and their product."""
APART = ComposedKernel(
    TensorPasses(9, 0, 3, strided=3, along=6), TensorPasses(20, 0, 6, strided=5, along=10),
    working=(2.0, 0.0), back_working=(2.0, 0.0), gated=True,
)  # fmt: skip
"""Transformer Engine's basic operation of halves in turns (2.16, ops/basic/swiglu.py, _ScaledGLU with
glu_interleave_size: what is not in 8 bits): halves apart by a copy, SwiGLU, a product by weights. Back: the
copy, a product, SwiGLU's, its gradient put in turns; SwiGLU once more for the weights' gradient. The halves
apart are there beside, and back with their gradient."""


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
        if kernel.name != "experts_act":
            return (kernel,)
        sources, half = kernel.reads, kernel.writes[0].bytes
        names = tuple(f"{name}_clamped" for name in sources)
        new = tuple(structs.replace(values[old], name=name) for old, name in zip(sources, names, strict=True))
        first = Kernel(GATE_CLAMPS, "memory_bound", kernel.component, sources, new, saves=sources)
        first = charged(first, CLAMPS, CLAMPS_BACKWARD, float(half))
        return first, structs.replace(kernel, reads=names, saves=names)

    return each(kernels, change)
