"""The experts of a rank by grouped products, for the forward, the inputs and the weights.

Rows [R, H] are sorted by expert, and packed with their route weights (`fused.split_packed`); ends [E]: where
each expert's end, on the device.
"""

from torch import Tensor

from mopexec.operators import grouped
from mopexec.operators.activation import Activation, fused_, fused_backward_, wings_of
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import split_packed
from mopexec.operators.grouped import Groups

Weights = dict[str, Tensor]
_PREFIX = "moe.experts."


def fits(rows: Tensor, experts: Weights) -> bool:
    """See `grouped.fits`."""
    return grouped.fits(rows, experts, _PREFIX)


def _groups(ends: Tensor, experts: Weights, num_rows: int) -> Groups:
    return Groups(ends, num_rows, biased=f"{_PREFIX}up_proj_bias" in experts)


def _named(experts: Weights, name: str) -> tuple[Tensor, Tensor | None]:
    return experts[f"moe.experts.{name}_proj"], experts.get(f"moe.experts.{name}_proj_bias")


def forward(rows: list[Tensor], ends: Tensor, experts: Weights, how: Activation) -> None:
    """The last of `rows`, packed, becomes weight * expert(row) [R, H], a new tensor. Temporaries: 2 I R,
    without a gate I R."""
    inputs, route_weights = _unpack(rows.pop(), experts)
    groups = _groups(ends, experts, inputs.shape[0])
    wings = [groups.product(inputs, *_named(experts, name)) for name in wings_of(how)]
    inner = fused_(wings, route_weights, how)
    del wings
    down, bias = _named(experts, "down")
    share = None if bias is None else route_weights[:, None].to(inputs.dtype)
    del inputs, route_weights
    out = groups.product(inner, down)
    if bias is not None and share is not None:
        out.addcmul_(groups.of_rows(bias), share)
    rows.append(out)


def backward(
    rows: list[Tensor], ends: Tensor, experts: Weights, grads: Weights, how: Activation, *,
    whole: bool = False,
) -> Tensor:  # fmt: skip
    """rows: packed inputs, and gradients of weight * expert(input) [R, H], become the gradients of the inputs
    alone; grads += the weights'. whole: the output runs again too, as in a checkpoint of the products, though
    nobody reads it.

    Returns the gradients of the route weights [R] in the wide dtype. Temporaries: 3 I R, without a gate
    2 I R, the gradients of one stack of weights, and 2 H R at the end.
    """
    given = rows.pop()
    inputs, route_weights = _unpack(rows.pop(), experts)
    groups = _groups(ends, experts, given.shape[0])
    names = wings_of(how)
    wings = [groups.product(inputs, *_named(experts, name)) for name in names]
    down, bias = _named(experts, "down")
    inner = groups.product(given, down.transpose(1, 2))
    grad_weights = fused_backward_(inner, wings, route_weights, how)
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
    for name, grad in zip(names, wings, strict=True):
        groups.add_weights(grads[f"moe.experts.{name}_proj"], inputs, grad)
        groups.add_bias(grads.get(f"moe.experts.{name}_proj_bias"), grad)
    del inputs, route_weights, grad
    result = groups.product(wings.pop(0), _named(experts, names[0])[0].transpose(1, 2))
    for name in names[1:]:
        result.add_(groups.product(wings.pop(0), _named(experts, name)[0].transpose(1, 2)))
    rows.append(result)
    return grad_weights


def _unpack(packed: Tensor, experts: Weights) -> tuple[Tensor, Tensor]:
    return split_packed(packed, experts[f"{_PREFIX}up_proj"].shape[1])
