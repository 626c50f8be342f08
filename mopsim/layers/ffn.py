"""The tapes of a dense FFN or a shared expert, over a slice of tokens."""

from mopsim.layers.attention import gather, linear, scatter
from mopsim.layers.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec


def ffn(
    model: ModelSpec, tokens: int, width: int, b: int, component: str, tensor: int = 1, fused: bool = False
) -> Tape:
    """h [n,H] -> f [n,H] through `width` columns, gated where the spec has three matrices.

    tensor: ranks that split the columns; each brings `tokens` rows, gathered before and scattered after.
    fused: gate and up in one product, SwiGLU in one kernel.
    """
    H, inner = model.hidden_size, width / tensor
    if fused:
        return _fused(model, tokens, inner, b, component, tensor)
    size = int(tokens * inner * b)
    h, act, out = Value("h", tokens * H * b), Value("act", size), Value("f", tokens * H * b)
    kernels = []
    if model.ffn_matrices == 3:
        kernels.append(linear("gate_proj", "h", Value("gate", size), tokens, inner, H, b, component))
        kernels.append(linear("up_proj", "h", Value("up", size), tokens, inner, H, b, component))
        kernels.append(
            Kernel(
                "silu",
                "memory_bound",
                component,
                ("gate",),
                (Value("silu", size),),
                saves=("gate",),
                bytes=2 * size,
            )
        )
        kernels.append(
            Kernel(
                "gated",
                "memory_bound",
                component,
                ("silu", "up"),
                (act,),
                saves=("silu", "up"),
                bytes=3 * size,
                back_launches=2,
            )
        )
    else:
        kernels.append(linear("up_proj", "h", Value("up", size), tokens, inner, H, b, component))
        kernels.append(
            Kernel("gelu", "memory_bound", component, ("up",), (act,), saves=("up",), bytes=2 * size)
        )
    kernels.append(linear("down_proj", "act", out, tokens, H, inner, b, component))
    return Tape((h,), tuple(kernels), ("f",))


def _fused(model: ModelSpec, tokens: int, inner: float, b: int, component: str, tensor: int) -> Tape:
    H, rows = model.hidden_size, tokens * tensor
    size, wings = int(rows * inner * b), 2 if model.ffn_matrices == 3 else 1
    h, out = Value("h", tokens * H * b), Value("f", tokens * H * b)
    wide, act = Value("gate_up", wings * size), Value("act", size)
    split = tensor > 1
    kernels = [gather("gather_h", "h", Value("hg", rows * H * b), component)] if split else []
    kernels += [
        linear("up_proj", "hg" if split else "h", wide, rows, wings * inner, H, b, component, "h"),
        Kernel(
            "act", "memory_bound", component, ("gate_up",), (act,), saves=("gate_up",),
            bytes=(wings + 1) * size, back_bytes=(2 * wings + 1) * size,
        ),
        linear("down_proj", "act", Value("fp", rows * H * b) if split else out, rows, H, inner, b, component),
    ]  # fmt: skip
    if split:
        kernels.append(scatter("scatter_f", "fp", out, rows * H * b, component))
    return Tape((h,), tuple(kernels), ("f",))
