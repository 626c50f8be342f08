"""The attention half of a layer for projections that the explicit block has no backward of: latent attention,
biases, a norm over the full projection. What lies before the exchange is the reference's own function, run
again in the backward with a graph of its own that lives no longer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mopexec.measure.tracker import component, phase
from mopexec.model.attention import OwnRows, project, value_width
from mopexec.operators.attention import AttentionBlock, Saved, Weights

_PREFIX = "attention."
_AFTER = ("o_proj.weight", "o_proj.bias", "sinks")
"""Parameters that the projections do not use."""


def _leaf(value: Tensor, take: Callable[[Tensor], Any]) -> Tensor:
    """A leaf whose gradient is taken as soon as it is there: `torch.autograd.grad` holds all to its end."""
    leaf = value.detach().requires_grad_()

    def taken(leaf: Tensor) -> None:
        assert leaf.grad is not None
        take(leaf.grad)
        leaf.grad = None

    leaf.register_post_accumulate_grad_hook(taken)  # type: ignore[no-untyped-call]
    return leaf


class _Inputs(OwnRows):
    """Each product reads a leaf of its own, whose gradients are added in place one after the other. So does
    autograd with those of one leaf, but not under a dispatch mode, as a tracker is.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def product(self, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        """See `OwnRows.product`."""
        return super().product(weights, name, x if x.requires_grad else _leaf(x, self._add))

    own = product

    def taken(self) -> Tensor:
        """The sum, given away."""
        found, self._sum = self._sum, None
        assert found is not None
        return found

    def _add(self, grad: Tensor) -> None:
        self._sum = grad if self._sum is None else self._sum.add_(grad)


class ComposedAttention(AttentionBlock):
    """See `AttentionBlock`."""

    def backward(
        self, grad: Tensor, x: Tensor, saved: list[Saved], weights: Weights, grads: Weights,
        cored: Callable[[], None],
    ) -> None:  # fmt: skip
        """See `AttentionBlock.backward`."""
        with component("attention"), phase("backward"):
            packed = list(self._core_backward(grad, saved.pop(), weights, grads))
            cored()
            spec, shape = self.spec, (self.exchange.batch, self.exchange.seq)
            kv_heads = self._heads("k")
            widths = {"q": spec.head_dim, "k": spec.head_dim, "v": value_width(spec)}
            outer = []
            for name in "qkv":
                heads = spec.num_attention_heads if name == "q" else kv_heads
                outer.append(self.exchange.merge(packed.pop(0), heads).view(*shape, heads, widths[name]))
            hidden = self.norms.forward(x, weights, "attention_norm")
            own, rows = self._own(weights), _Inputs()
            with torch.enable_grad():
                named = {name: _leaf(value, grads[f"{_PREFIX}{name}"].add_) for name, value in own.items()}
                whole = hidden.view(*shape, -1)
                found = project(spec, named, whole, self.cos, self.sin, rows, **self._how)
            torch.autograd.backward(found, outer)
            del found, outer, named, hidden, whole
            grad_hidden = rows.taken()
            self.norms.backward_(grad, x, grad_hidden.view(x.shape), weights, grads, "attention_norm")

    @property
    def _how(self) -> dict[str, Any]:
        return {"rotates": self.rotates, "factors": self.factors}

    def _heads(self, name: str) -> int:
        latent = self.spec.attention == "mla"
        return self.spec.num_attention_heads if name == "q" or latent else self.spec.num_key_value_heads

    def _received(self, x: Tensor, weights: Weights) -> list[Tensor]:
        hidden = self.norms.forward(x, weights, "attention_norm")
        rows = hidden.view(self.exchange.batch, self.exchange.seq, -1)
        own = self._own(weights)
        found = list(project(self.spec, own, rows, self.cos, self.sin, **self._how))
        del hidden, rows
        received = []
        while found:
            part = found.pop(0)
            heads, width = part.shape[2:]
            packed = [self.exchange.pack(part.flatten(0, 1).flatten(1), heads)]
            del part
            received.append(self.exchange.to_heads(packed).unflatten(-1, (-1, width)))  # type: ignore[no-untyped-call]
        return received

    def _unrotate_(self, packed: list[Tensor]) -> None:
        """Nothing: the graph of the projections has the rotation and the factors."""

    @staticmethod
    def _own(weights: Weights) -> Weights:
        """The projections' parameters by their names in the block."""
        names = [name.removeprefix(_PREFIX) for name in weights if name.startswith(_PREFIX)]
        return {name: weights[f"{_PREFIX}{name}"] for name in names if name not in _AFTER}
