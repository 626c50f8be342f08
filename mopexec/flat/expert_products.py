"""Grouped products: all experts of a rank in one kernel, for the forward, the inputs and the weights.

Rows [R, H] are sorted by expert; arrived [group, local] counts them on the device: no count is uploaded.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.model import kernels
from mopexec.model.fused import OPS
from mopexec.model.routing import wide
from mopexec.model.swiglu import Clamp

Weights = dict[str, Tensor]
_BLOCK = 8
"""Elements of 16 bytes in bf16: what grouped products want rows to be multiples of, on CUDA."""


def fits(rows: Tensor, experts: Weights) -> bool:
    """Whether the stack asks for grouped products and torch has them: bf16, rows of whole 16 bytes."""
    inner = experts["moe.experts.gate_proj"].shape[2]
    whole = rows.shape[0] > 0 and rows.shape[1] % _BLOCK == 0 and inner % _BLOCK == 0
    return kernels.NOW.grouped and rows.dtype == torch.bfloat16 and whole


class _Groups:
    """Where each expert's rows end, and the expert of each row where biases ask for it."""

    def __init__(self, arrived: Tensor, experts: Weights, num_rows: int) -> None:
        counts = arrived.sum(0)
        self.ends = counts.cumsum(0, dtype=torch.int32)
        self.expert: Tensor | None = None
        if "moe.experts.gate_proj_bias" in experts:
            place = torch.arange(counts.shape[0], device=counts.device)
            self.expert = torch.repeat_interleave(place, counts, output_size=num_rows)

    def product(self, rows: Tensor, stack: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows [R, a] times their experts' [E, a, b]."""
        out = F.grouped_mm(rows, stack, offs=self.ends)
        return out if bias is None else out.add_(self.of_rows(bias))

    def of_rows(self, bias: Tensor) -> Tensor:
        """A bias [E, b] row by row."""
        assert self.expert is not None
        return bias.index_select(0, self.expert)

    def add_weights(self, target: Tensor, rows: Tensor, grads: Tensor) -> None:
        """target [E, a, b] += rows [R, a] transposed times grads [R, b], by expert."""
        target.add_(F.grouped_mm(rows.t(), grads, offs=self.ends))

    def add_bias(self, target: Tensor | None, grads: Tensor) -> None:
        """target [E, b] += the sum of each expert's rows, as a product with ones: in a fixed order."""
        if target is not None:
            ones = torch.ones((grads.shape[0], _BLOCK), dtype=grads.dtype, device=grads.device)
            target.add_(F.grouped_mm(ones.t(), grads, offs=self.ends)[:, 0])


def _named(experts: Weights, name: str) -> tuple[Tensor, Tensor | None]:
    return experts[f"moe.experts.{name}_proj"], experts.get(f"moe.experts.{name}_proj_bias")


def forward(
    rows: list[Tensor], route_weights: Tensor, arrived: Tensor, experts: Weights, clamp: Clamp | None
) -> None:
    """The last of `rows`, [R, H], becomes weight * expert(row), a new tensor. Temporaries: 2 I R."""
    inputs = rows.pop()
    groups = _Groups(arrived, experts, inputs.shape[0])
    gate, up = (groups.product(inputs, *_named(experts, name)) for name in ("gate", "up"))
    del inputs
    OPS.swiglu_(gate, up, route_weights, *_limits(clamp))
    del up
    down, bias = _named(experts, "down")
    out = groups.product(gate, down)
    if bias is not None:
        out.addcmul_(groups.of_rows(bias), route_weights[:, None].to(out.dtype))
    rows.append(out)


def backward(
    rows: list[Tensor], route_weights: Tensor, arrived: Tensor, experts: Weights, grads: Weights,
    clamp: Clamp | None,
) -> Tensor:  # fmt: skip
    """rows: inputs and gradients of weight * expert(input), each [R, H], become the gradients of the inputs
    alone; grads += the weights'.

    Returns the gradients of the route weights [R] in the wide dtype. Temporaries: 3 I R, the gradients of one
    stack of weights, and 2 H R at the end.
    """
    given, inputs = rows.pop(), rows.pop()
    groups = _Groups(arrived, experts, given.shape[0])
    gate, up = (groups.product(inputs, *_named(experts, name)) for name in ("gate", "up"))
    down, bias = _named(experts, "down")
    inner = groups.product(given, down.transpose(1, 2))
    grad_weights: Tensor = OPS.swiglu_backward_(inner, gate, up, route_weights, *_limits(clamp))
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
    del inputs, grad
    result = groups.product(gate, _named(experts, "gate")[0].transpose(1, 2))
    del gate
    result.add_(groups.product(up, _named(experts, "up")[0].transpose(1, 2)))
    rows.append(result)
    return grad_weights


def _limits(clamp: Clamp | None) -> tuple[float, float]:
    return (clamp.limit, clamp.alpha) if clamp else (0.0, 0.0)
