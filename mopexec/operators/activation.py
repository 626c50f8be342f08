"""What a feed-forward makes of its first products, its wings (gate and up, or up alone), and the backward:
SwiGLU, clamped or not, or an activation without a gate.
"""

from torch import Tensor
from torch.nn import functional as F

from mopexec.operators.fused import OPS
from mopexec.operators.swiglu import (
    Clamp,
    clamp_of,
    clamped_activation,
    clamped_activation_backward,
    swiglu_activation,
    swiglu_activation_backward,
)
from mopexec.operators.ungated import Ungated, ungated_, ungated_backward_, ungated_of
from mopsim.spec.model import ModelSpec

Activation = Clamp | Ungated | None
"""None: SwiGLU."""


def activation_of(spec: ModelSpec) -> Activation:
    """Of the network's experts."""
    return ungated_of(spec) or clamp_of(spec)


def wings_of(how: Activation) -> tuple[str, ...]:
    """The products that it reads."""
    return ("up",) if isinstance(how, Ungated) else ("gate", "up")


def activated_(wings: list[Tensor], how: Activation) -> Tensor:
    """The activation of wings [R, I], which it takes; in the memory of the first unless they are clamped."""
    if isinstance(how, Ungated):
        return ungated_(wings.pop(), how)
    up, gate = wings.pop(), wings.pop()
    return swiglu_activation(gate, up) if how is None else clamped_activation(gate, up, how)


def activated(wings: list[Tensor], how: Activation) -> tuple[Tensor, Tensor | None]:
    """(the activation of wings, SiLU of the gate where the backward takes it); wings stay."""
    if isinstance(how, Ungated):
        return ungated_(wings[0].clone(), how), None
    gate, up = wings
    if how is not None:
        return clamped_activation(gate, up, how), None
    silu = F.silu(gate)
    return silu * up, silu


def activated_backward(
    grad: Tensor, wings: list[Tensor], silu: Tensor | None, how: Activation
) -> list[Tensor]:
    """Gradients of wings from that of `activated`; takes the memory of all that it gets."""
    if isinstance(how, Ungated):
        return [ungated_backward_(grad, wings[0], how)]
    gate, up = wings
    if how is not None:
        return list(clamped_activation_backward(grad, gate, up, how))
    assert silu is not None
    return list(swiglu_activation_backward(grad, gate, up, silu))


def fused_(wings: list[Tensor], weight: Tensor | None, how: Activation) -> Tensor:
    """The activation times weight [R] where given, in the first of the wings, in one kernel."""
    if isinstance(how, Ungated):
        OPS.ungated_(*wings, weight, how.function)
    else:
        OPS.swiglu_(*wings, weight, *_limits(how))
    return wings[0]


def fused_backward_(grad: Tensor, wings: list[Tensor], weight: Tensor | None, how: Activation) -> Tensor:
    """grad, of what `fused_` makes, becomes that; wings their gradients. Returns the gradient of weight [R]
    in the wide dtype, [0] without one."""
    if isinstance(how, Ungated):
        found: Tensor = OPS.ungated_backward_(grad, *wings, weight, how.function)
    else:
        found = OPS.swiglu_backward_(grad, *wings, weight, *_limits(how))
    return found


def _limits(clamp: Clamp | None) -> tuple[float, float]:
    return (clamp.limit, clamp.alpha) if clamp else (0.0, 0.0)
