"""The tapes of a dense FFN or a shared expert, over a slice of tokens."""

from functools import lru_cache

from mopsim.graph.attention import linear
from mopsim.graph.region import begin, end
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec


@lru_cache(maxsize=1024)
def ffn(model: ModelSpec, width: int, component: str, shapes: Shapes) -> Tape:
    """h [N,H] -> f [N,H] through `width` columns, which are split over `tensor`: gate (where the spec has
    three matrices) and up in one product and their activation in one kernel, or each apart (Shapes.fused)."""
    H, rows, b, inner = model.hidden_size, shapes.region_tokens, shapes.width, width / shapes.tensor
    h, out = Value("h", shapes.tokens * H * b), Value("f", shapes.tokens * H * b)
    size, wings = int(rows * inner * b), ("gate", "up") if model.ffn_matrices == 3 else ("up",)
    first, source = begin("gather_h", "h", H, component, shapes)

    def product(name: str, wide: Value, columns: float) -> Kernel:
        return linear(f"{name}_proj", source, wide, rows, columns, H, b, component, "h")

    inside: tuple[Kernel, ...]
    if shapes.fused:
        wide, act = fused_activation(model, "act", component, size)
        inside = (product("up", wide, len(wings) * inner), act)
    else:
        products = (product(name, Value(name, size), inner) for name in wings)
        inside = (*products, *activation(model, "", component, size))

    def down(out: Value) -> Kernel:
        return linear("down_proj", "act", out, rows, H, inner, b, component)

    return Tape((h,), (*first, *inside, *end("scatter_f", down, out, component, shapes)), ("f",))


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
