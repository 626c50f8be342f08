"""The tapes of a dense FFN or a shared expert, over a slice of tokens."""

from mopsim.graph.attention import linear
from mopsim.graph.region import begin, end
from mopsim.graph.shapes import Shapes
from mopsim.graph.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec


def ffn(model: ModelSpec, tokens: int, width: int, b: int, component: str) -> Tape:
    """h [n,H] -> f [n,H] through `width` columns, gated where the spec has three matrices."""
    H, size = model.hidden_size, tokens * width * b
    h, act, out = Value("h", tokens * H * b), Value("act", size), Value("f", tokens * H * b)
    kernels = []
    if model.ffn_matrices == 3:
        kernels.append(linear("gate_proj", "h", Value("gate", size), tokens, width, H, b, component))
        kernels.append(linear("up_proj", "h", Value("up", size), tokens, width, H, b, component))
        kernels.append(
            Kernel(
                "silu", "memory_bound", component, ("gate",), (Value("silu", size),), saves=("gate",),
                bytes=2 * size,
            )
        )  # fmt: skip
        kernels.append(
            Kernel(
                "gated", "memory_bound", component, ("silu", "up"), (act,), saves=("silu", "up"),
                bytes=3 * size, back_launches=2,
            )
        )  # fmt: skip
    else:
        kernels.append(linear("up_proj", "h", Value("up", size), tokens, width, H, b, component))
        kernels.append(
            Kernel("gelu", "memory_bound", component, ("up",), (act,), saves=("up",), bytes=2 * size)
        )
    kernels.append(linear("down_proj", "act", out, tokens, H, width, b, component))
    return Tape((h,), tuple(kernels), ("f",))


def fused_ffn(model: ModelSpec, width: int, component: str, shapes: Shapes) -> Tape:
    """h [N,H] -> f [N,H] with gate and up in one product and SwiGLU in one kernel; columns are split over
    `tensor`."""
    H, rows, b = model.hidden_size, shapes.region_tokens, shapes.width
    inner = width / shapes.tensor
    size, wings = int(rows * inner * b), 2 if model.ffn_matrices == 3 else 1
    h, out = Value("h", shapes.tokens * H * b), Value("f", shapes.tokens * H * b)
    wide, act = Value("gate_up", wings * size), Value("act", size)
    first, source = begin("gather_h", "h", H, component, shapes)
    kernels = (
        *first,
        linear("up_proj", source, wide, rows, wings * inner, H, b, component, "h"),
        Kernel(
            "act", "memory_bound", component, ("gate_up",), (act,), saves=("gate_up",),
            bytes=(wings + 1) * size, back_bytes=(2 * wings + 1) * size,
        ),
    )  # fmt: skip

    def product(out: Value) -> Kernel:
        return linear("down_proj", "act", out, rows, H, inner, b, component)

    return Tape((h,), kernels + end("scatter_f", product, out, component, shapes), ("f",))
