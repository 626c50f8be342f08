"""The tapes of a dense FFN or a shared expert, over a slice of tokens."""

from functools import lru_cache

from mopsim.graph.attention import linear
from mopsim.graph.region import begin, end
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec


@lru_cache(maxsize=1024)
def ffn(model: ModelSpec, tokens: int, width: int, b: int, component: str) -> Tape:
    """h [n,H] -> f [n,H] through `width` columns, gated where the spec has three matrices."""
    H, size = model.hidden_size, tokens * width * b
    h, out = Value("h", tokens * H * b), Value("f", tokens * H * b)
    gated = ("gate",) if model.ffn_matrices == 3 else ()
    kernels = (
        *(
            linear(f"{name}_proj", "h", Value(name, size), tokens, width, H, b, component)
            for name in (*gated, "up")
        ),
        *activation(model, "", component, size),
        linear("down_proj", "act", out, tokens, H, width, b, component),
    )
    return Tape((h,), kernels, ("f",))


def activation(model: ModelSpec, prefix: str, component: str, size: int) -> tuple[Kernel, ...]:
    """gate and up, of `size` bytes each, to act: SiLU and a product, or GELU of up alone. prefix: of the
    kernels' names."""
    act = Value("act", size)
    if model.ffn_matrices != 3:
        return (
            Kernel(
                f"{prefix}gelu", "memory_bound", component, ("up",), (act,), saves=("up",), bytes=2 * size
            ),
        )
    return (
        Kernel(
            f"{prefix}silu", "memory_bound", component, ("gate",), (Value("silu", size),), saves=("gate",),
            bytes=2 * size,
        ),
        Kernel(
            f"{prefix}gated", "memory_bound", component, ("silu", "up"), (act,), saves=("silu", "up"),
            bytes=3 * size, back_launches=2,
        ),
    )  # fmt: skip


def fused_activation(model: ModelSpec, name: str, component: str, size: int) -> tuple[Value, Kernel]:
    """(gate and up in one tensor, the kernel that makes act of it, of `size` bytes)."""
    wings = model.ffn_matrices - 1
    return Value("gate_up", wings * size), Kernel(
        name, "memory_bound", component, ("gate_up",), (Value("act", size),), saves=("gate_up",),
        bytes=(wings + 1) * size, back_bytes=(2 * wings + 1) * size,
    )  # fmt: skip


def fused_ffn(model: ModelSpec, width: int, component: str, shapes: Shapes) -> Tape:
    """h [N,H] -> f [N,H] with gate and up in one product and SwiGLU in one kernel; columns are split over
    `tensor`."""
    H, rows, b = model.hidden_size, shapes.region_tokens, shapes.width
    inner = width / shapes.tensor
    h, out = Value("h", shapes.tokens * H * b), Value("f", shapes.tokens * H * b)
    wide, act = fused_activation(model, "act", component, int(rows * inner * b))
    first, source = begin("gather_h", "h", H, component, shapes)
    kernels = (
        *first,
        linear("up_proj", source, wide, rows, (model.ffn_matrices - 1) * inner, H, b, component, "h"),
        act,
    )

    def product(out: Value) -> Kernel:
        return linear("down_proj", "act", out, rows, H, inner, b, component)

    return Tape((h,), kernels + end("scatter_f", product, out, component, shapes), ("f",))
