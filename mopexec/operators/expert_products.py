"""The experts of a rank by grouped products, for the forward, the inputs and the weights.

Rows [R, H] are sorted by expert, and packed with their route weights (`fused.split_packed`); ends [E]: where
each expert's end, on the device.
"""

from torch import Tensor

from mopexec.operators import grouped
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import OPS, split_packed
from mopexec.operators.grouped import Groups
from mopexec.operators.swiglu import Clamp

Weights = dict[str, Tensor]
_PREFIX = "moe.experts."


def fits(rows: Tensor, experts: Weights) -> bool:
    """See `grouped.fits`."""
    return grouped.fits(rows, experts, _PREFIX)


def _groups(ends: Tensor, experts: Weights, num_rows: int) -> Groups:
    return Groups(ends, num_rows, biased=f"{_PREFIX}gate_proj_bias" in experts)


def _named(experts: Weights, name: str) -> tuple[Tensor, Tensor | None]:
    return experts[f"moe.experts.{name}_proj"], experts.get(f"moe.experts.{name}_proj_bias")


def forward(rows: list[Tensor], ends: Tensor, experts: Weights, clamp: Clamp | None) -> None:
    """The last of `rows`, packed, becomes weight * expert(row) [R, H], a new tensor. Temporaries: 2 I R."""
    inputs, route_weights = _unpack(rows.pop(), experts)
    groups = _groups(ends, experts, inputs.shape[0])
    gate, up = (groups.product(inputs, *_named(experts, name)) for name in ("gate", "up"))
    OPS.swiglu_(gate, up, route_weights, *_limits(clamp))
    del up
    down, bias = _named(experts, "down")
    share = None if bias is None else route_weights[:, None].to(inputs.dtype)
    del inputs, route_weights
    out = groups.product(gate, down)
    if bias is not None and share is not None:
        out.addcmul_(groups.of_rows(bias), share)
    rows.append(out)


def backward(
    rows: list[Tensor], ends: Tensor, experts: Weights, grads: Weights, clamp: Clamp | None, *,
    whole: bool = False,
) -> Tensor:  # fmt: skip
    """rows: packed inputs, and gradients of weight * expert(input) [R, H], become the gradients of the inputs
    alone; grads += the weights'. whole: the output runs again too, as in a checkpoint of the products, though
    nobody reads it.

    Returns the gradients of the route weights [R] in the wide dtype. Temporaries: 3 I R, the gradients of one
    stack of weights, and 2 H R at the end.
    """
    given = rows.pop()
    inputs, route_weights = _unpack(rows.pop(), experts)
    groups = _groups(ends, experts, given.shape[0])
    gate, up = (groups.product(inputs, *_named(experts, name)) for name in ("gate", "up"))
    down, bias = _named(experts, "down")
    inner = groups.product(given, down.transpose(1, 2))
    grad_weights: Tensor = OPS.swiglu_backward_(inner, gate, up, route_weights, *_limits(clamp))
    if whole:
        groups.product(inner, down)
    groups.add_weights(grads["moe.experts.down_proj"], inner, given)
    del inner
    if bias is not None:
        grad_weights.add_((given * groups.of_rows(bias)).sum(-1, dtype=wide(given.dtype)))
        groups.add_bias(
            grads.get("moe.experts.down_proj_bias"), given * route_weights[:, None].to(given.dtype)
        )
    del given
    for name, grad in (("gate", gate), ("up", up)):
        groups.add_weights(grads[f"moe.experts.{name}_proj"], inputs, grad)
        groups.add_bias(grads.get(f"moe.experts.{name}_proj_bias"), grad)
    del inputs, route_weights, grad
    result = groups.product(gate, _named(experts, "gate")[0].transpose(1, 2))
    del gate
    rows.append(result.add_(groups.product(up, _named(experts, "up")[0].transpose(1, 2))))
    return grad_weights


def _unpack(packed: Tensor, experts: Weights) -> tuple[Tensor, Tensor]:
    return split_packed(packed, experts[f"{_PREFIX}gate_proj"].shape[1])


def _limits(clamp: Clamp | None) -> tuple[float, float]:
    return (clamp.limit, clamp.alpha) if clamp else (0.0, 0.0)
