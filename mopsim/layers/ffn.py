"""The tapes of a dense FFN or a shared expert, over a slice of tokens."""

from mopsim.layers.attention import linear
from mopsim.layers.tape import Kernel, Tape, Value
from mopsim.spec.model import ModelSpec


def ffn(model: ModelSpec, tokens: int, width: int, b: int, component: str, tensor: int = 1) -> Tape:
    """h [n,H] -> f [n,H] through `width` columns (split over `tensor`), gated where the spec has three
    matrices."""
    H, inner = model.hidden_size, width / tensor
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
