"""Gated activations that no kernel fuses."""

from msgspec.structs import replace

from mopsim.graph.rewrites.tensor_passes import TensorPasses, instead
from mopsim.graph.tape import GATE_CLAMPS, Kernel

GATED, GATED_BACKWARD = TensorPasses(5, 0, 2), TensorPasses(9, 0, 3)
"""SiLU and a product; two products and SiLU's backward."""
STRIDED, STRIDED_BACKWARD = TensorPasses(10, 0, 2), TensorPasses(20, 0, 4)
"""The same of halves of one tensor, whose gradients are put together: torch follows strides element by
element. As streaming passes in the time that they take: 8.9 and 17.9 on H100 for 4,096 rows of 1,536 and
of 6,144, 11.3 and 21.9 on an earlier machine of faster memory (BastiaanGroot/ML-Infrastructure-Engineer,
training/profiles: on H100 SiLU 77 us, product 80; products 80 and 49, SiLU's backward 91, concatenation
94), their middles."""
CLAMPED, CLAMPED_BACKWARD = TensorPasses(18, 0, 7), TensorPasses(50, 0, 18)
"""gpt-oss's gate (transformers, modeling_gpt_oss.py): every second column of one tensor clamped, twice, a
scale, a sigmoid, two products and a shift. Back: two gradients of each product, one of the sigmoid and of the
scale, their sum, a mask of each clamp, and each half written into zeros of the whole and added."""
CLAMPS, CLAMPS_BACKWARD = TensorPasses(8, 0, 4), TensorPasses(15, 0, 9)
"""Megatron-Core's experts (fused_bias_geglu.py, weighted_bias_quick_geglu_impl): halves clamped and put
together, in passes over one of them, before the compiled gate; and the shift as a tensor, whose copy to the
device the host waits for. Back: a mask of each bound, both of the second half's at once, what they let pass,
put together."""
SHIFTED, SHIFTED_BACKWARD = TensorPasses(9, 2, 5), TensorPasses(16, 7, 9)
"""Megatron-Core's experts without bias_activation_fusion: SiLU, a shift of the other half, a product, one by
weights in fp32, a cast. Back: a cast, two gradients, a cast, a sum, two more, SiLU's, halves put together."""
UNGATED, UNGATED_BACKWARD = TensorPasses(4, 0, 2), TensorPasses(9, 0, 4)
"""The same without a gate: GELU and a product by weights, which are as narrow as the rows unless the router
is asked for fp32 (core_v0.14.0, experts.py, TEGroupedMLP, and moe_utils.py). Back: two gradients, of which
one is summed, and GELU's."""
APART, APART_BACKWARD = TensorPasses(9, 0, 3), TensorPasses(20, 0, 6)
"""Transformer Engine's basic operation of halves in turns (2.16, ops/basic/swiglu.py, _ScaledGLU with
glu_interleave_size: what is not in 8 bits): halves apart by a copy, SwiGLU, a product by weights. Back: the
copy, a product, SwiGLU's, its gradient put in turns; SwiGLU once more for the weights' gradient."""


def gated(kernel: Kernel, wider: float, wings: int, strided: bool = False) -> Kernel:
    """Keeps the result of SiLU beside what it reads. Apart already: two tensors in one kernel. strided: two
    halves of one."""
    if wings != 2 or kernel.name not in ("act", "experts_act"):
        return kernel
    found = instead(kernel, wider, *((STRIDED, STRIDED_BACKWARD) if strided else (GATED, GATED_BACKWARD)))
    return _keeping(kernel, found, "silu")


def shifted(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Keeps the result of SiLU, the other half shifted, if by nothing, and their product; without a gate
    what is weighed."""
    if wings != 2:
        return _keeping(kernel, instead(kernel, wider, UNGATED, UNGATED_BACKWARD), "act")
    found = instead(kernel, wider, SHIFTED, SHIFTED_BACKWARD)
    return _keeping(kernel, found, "silu", "shifted", "glu")


def apart(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Keeps what it reads; the halves apart are there beside, and back with their gradient."""
    if wings != 2:
        return kernel
    act = kernel.writes[0]
    found = instead(kernel, wider, APART, APART_BACKWARD)
    beside = (act.category, 2 * act.bytes)
    return replace(found, scratch=(*found.scratch, beside), back_scratch=(*found.back_scratch, beside))


def gated_within(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The first product of routed experts ends in the gate and in the cast of the second's input, the
    second's backward in the gate's and in the cast of its gradient (Transformer Engine 2.14 to 2.18,
    ops/fused, grouped_mlp: what is in MXFP8, from one kernel each)."""
    changes: dict[str, dict[str, object]] = {
        "experts_up": {"back_casts": False}, "experts_down": {"casts": False},
        "experts_act": {"kind": "view", "bytes": 0.0, "back_bytes": 0.0, "launches": 0, "back_launches": 0},
    }  # fmt: skip
    return tuple(replace(one, **changes[one.name]) if one.name in changes else one for one in kernels)


def clamped(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Keeps the gate clamped, its sigmoid, their product and the shifted other half. Back, the halves'
    gradients lie in two tensors of the whole before they are added."""
    found = instead(kernel, wider, CLAMPED, CLAMPED_BACKWARD)
    found = _keeping(kernel, found, "gate", "sigmoid", "glu", "up")
    return replace(found, back_scratch=(("dispatch", wings * kernel.writes[0].bytes),))


def clamps_apart(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The clamps keep gate and up, the gate both clamped."""
    found: list[Kernel] = []
    for kernel in kernels:
        if kernel.name == "experts_act":
            sources, half = kernel.reads, kernel.writes[0].bytes
            made = {value.name: value for one in found for value in one.writes}
            clamped = tuple(replace(made[name], name=f"{name}_clamped") for name in sources)
            first = Kernel(GATE_CLAMPS, "memory_bound", kernel.component, sources, clamped, saves=sources)
            found.append(
                replace(
                    first, bytes=float(CLAMPS.narrow * half), launches=CLAMPS.launches,
                    back_bytes=float(CLAMPS_BACKWARD.narrow * half), back_launches=CLAMPS_BACKWARD.launches,
                )
            )  # fmt: skip
            names = tuple(value.name for value in clamped)
            kernel = replace(kernel, reads=names, saves=names)
        found.append(kernel)
    return tuple(found)


def _keeping(kernel: Kernel, found: Kernel, *parts: str) -> Kernel:
    """With tensors as large as the output beside it, which are kept."""
    act = kernel.writes[0]
    kept = [replace(act, name=f"{act.name}_{part}", grad=False) for part in parts]
    return replace(found, writes=(act, *kept), saves=(*kernel.saves, *(value.name for value in kept)))


def clamped_again(kernel: Kernel, wider: float, wings: int) -> Kernel:
    """Keeps what it reads alone; the backward makes the rest again, beside the halves' gradients."""
    found = instead(kernel, wider, CLAMPED, CLAMPED_BACKWARD)
    return replace(found, back_scratch=(("activations", wings * kernel.writes[0].bytes),))
