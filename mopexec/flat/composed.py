"""The attention half of a layer for projections that the explicit block has no backward of: latent attention,
biases, a norm over the full projection. What lies before the exchange is the reference's own function, run
again in the backward with a graph of its own that lives no longer.
"""

import torch
from torch import Tensor

from mopexec.measure.tracker import component, phase
from mopexec.model.attention import project, value_width
from mopexec.operators.attention import AttentionBlock, Saved, Weights

_PREFIX = "attention."
_AFTER = ("o_proj.weight", "o_proj.bias", "sinks")
"""Parameters that the projections do not use."""


class ComposedAttention(AttentionBlock):
    """See `AttentionBlock`."""

    def backward(self, grad: Tensor, x: Tensor, saved: list[Saved], weights: Weights, grads: Weights) -> None:
        """See `AttentionBlock.backward`."""
        with component("attention"), phase("backward"):
            packed = list(self._core_backward(grad, saved.pop(), weights, grads))
            spec, shape = self.spec, (self.exchange.batch, self.exchange.seq)
            kv_heads = self._heads("k")
            widths = {"q": spec.head_dim, "k": spec.head_dim, "v": value_width(spec)}
            outer = []
            for name in "qkv":
                heads = spec.num_attention_heads if name == "q" else kv_heads
                outer.append(self.exchange.merge(packed.pop(0), heads).view(*shape, heads, widths[name]))
            hidden = self.norms.forward(x, weights, "attention_norm")
            own = self._own(weights)
            with torch.enable_grad():
                leaves = [hidden.view(*shape, -1).requires_grad_()]
                leaves += [value.detach().requires_grad_() for value in own.values()]
                named = dict(zip(own, leaves[1:], strict=True))
                found = project(spec, named, leaves[0], self.cos, self.sin, rotates=self.rotates)
            grad_hidden, *rest = torch.autograd.grad(found, leaves, outer)
            del found, outer, leaves, named
            for name, value in zip(own, rest, strict=True):
                grads[f"{_PREFIX}{name}"].add_(value)
            del rest
            self.norms.backward_(grad, x, grad_hidden.view(x.shape), weights, grads, "attention_norm")

    def _heads(self, name: str) -> int:
        latent = self.spec.attention == "mla"
        return self.spec.num_attention_heads if name == "q" or latent else self.spec.num_key_value_heads

    def _received(self, x: Tensor, weights: Weights) -> list[Tensor]:
        hidden = self.norms.forward(x, weights, "attention_norm")
        rows = hidden.view(self.exchange.batch, self.exchange.seq, -1)
        own = self._own(weights)
        found = list(project(self.spec, own, rows, self.cos, self.sin, rotates=self.rotates))
        del hidden, rows
        received = []
        while found:
            part = found.pop(0)
            heads, width = part.shape[2:]
            packed = self.exchange.pack(part.flatten(0, 1).flatten(1), heads)
            del part
            received.append(self.exchange.to_heads(packed).unflatten(-1, (-1, width)))  # type: ignore[no-untyped-call]
        return received

    def _unrotate_(self, packed: list[Tensor]) -> None:
        """Nothing: the graph of the projections has the rotation."""

    @staticmethod
    def _own(weights: Weights) -> Weights:
        """The projections' parameters by their names in the block."""
        names = [name.removeprefix(_PREFIX) for name in weights if name.startswith(_PREFIX)]
        return {name: weights[f"{_PREFIX}{name}"] for name in names if name not in _AFTER}
