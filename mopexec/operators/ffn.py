"""Dense feed-forwards and shared experts over token slices, each slice recomputed in its own backward."""

import torch
from torch import Tensor

from mopexec.measure.tracker import component, phase
from mopexec.operators import kernels
from mopexec.operators.activation import (
    activated,
    activated_,
    activated_backward,
    fused_,
    fused_backward_,
    wings_of,
)
from mopexec.operators.norms import LayerNorms
from mopexec.operators.rows import add_matmul
from mopexec.operators.ungated import Ungated, ungated_of
from mopsim.spec import layout
from mopsim.spec.model import ModelSpec

Weights = dict[str, Tensor]


class DenseBlock:
    """The FFN half of a dense layer: x2 = x1 + ffn(norm(x1)), `chunk_tokens` tokens at a time (0 = all)."""

    def __init__(self, spec: ModelSpec, chunk_tokens: int) -> None:
        self.chunk_tokens, self.norms, self.how = chunk_tokens, LayerNorms.of(spec), ungated_of(spec)

    def forward_(self, x: Tensor, weights: Weights) -> None:
        """x1 [N, H] becomes x2 in place."""
        with component("dense_ffn"):
            for start, stop in layout.token_slices(x.shape[0], self.chunk_tokens):
                hidden = self.norms.forward(x[start:stop], weights, "ffn_norm")
                add_ffn_(x[start:stop], hidden, weights, "ffn", self.how)
                del hidden

    def backward(self, grad: Tensor, x: Tensor, weights: Weights, grads: Weights) -> None:
        """grad [N, H] of x2 becomes that of x1 in place; x is x1; grads += the weights'."""
        with component("dense_ffn"), phase("backward"):
            for start, stop in layout.token_slices(x.shape[0], self.chunk_tokens):
                hidden = self.norms.forward(x[start:stop], weights, "ffn_norm")
                grad_hidden = ffn_backward(grad[start:stop], hidden, weights, grads, "ffn", self.how)
                del hidden
                self.norms.backward_(grad[start:stop], x[start:stop], grad_hidden, weights, grads, "ffn_norm")
                del grad_hidden


def _wings(hidden: Tensor, weights: Weights, prefix: str, how: Ungated | None) -> list[Tensor]:
    return [_product(hidden, weights, f"{prefix}.{name}_proj") for name in wings_of(how)]


def _product(rows: Tensor, weights: Weights, name: str) -> Tensor:
    weight, bias = weights[f"{name}.weight"].t(), weights.get(f"{name}.bias")
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def _add_bias(grads: Weights, name: str, grad: Tensor) -> None:
    """The gradient of a bias, if there is one, from that of its product."""
    if f"{name}.bias" in grads:
        grads[f"{name}.bias"].add_(grad.sum(0))


def add_ffn_(target: Tensor, hidden: Tensor, weights: Weights, prefix: str, how: Ungated | None) -> None:
    """target [n, H] += the feed-forward of hidden [n, H]. Temporaries: 2 n I, without a gate n I."""
    wings = _wings(hidden, weights, prefix, how)
    inner = fused_(wings, None, how) if kernels.NOW.activation else activated_(wings, how)
    del wings
    target.addmm_(inner, weights[f"{prefix}.down_proj.weight"].t())
    if f"{prefix}.down_proj.bias" in weights:
        target.add_(weights[f"{prefix}.down_proj.bias"])


def ffn_backward(
    grad: Tensor, hidden: Tensor, weights: Weights, grads: Weights, prefix: str, how: Ungated | None
) -> Tensor:
    """Gradient of hidden [n, H] from that of the output, recomputing the inner products; grads += the
    weights'.

    Temporaries: 5 n I, then 4 n I and the result; fused: 3 n I, then 2 n I and the result. Without a gate:
    2 n I, then n I and the result.
    """
    wings, down = _wings(hidden, weights, prefix, how), weights[f"{prefix}.down_proj.weight"]
    _add_bias(grads, f"{prefix}.down_proj", grad)
    if kernels.NOW.activation:
        grad_inner = grad @ down
        fused_backward_(grad_inner, wings, None, how)
        add_matmul(grads[f"{prefix}.down_proj.weight"], grad.t(), grad_inner)
        found = wings
    else:
        inner, silu = activated(wings, how)
        add_matmul(grads[f"{prefix}.down_proj.weight"], grad.t(), inner)
        del inner
        grad_inner = grad @ down
        found = activated_backward(grad_inner, wings, silu, how)
        del silu
    del wings, grad_inner
    names = wings_of(how)
    for name, one in zip(names, found, strict=True):
        add_matmul(grads[f"{prefix}.{name}_proj.weight"], one.t(), hidden)
        _add_bias(grads, f"{prefix}.{name}_proj", one)
    result = found[0] @ weights[f"{prefix}.{names[0]}_proj.weight"]
    for name, one in zip(names[1:], found[1:], strict=True):
        result.addmm_(one, weights[f"{prefix}.{name}_proj.weight"])
    return result


def slice_rows(x: Tensor, chunk_tokens: int) -> list[Tensor]:
    """x [n, H] (any strides) as views of at most `chunk_tokens` rows."""
    return [x[start:stop] for start, stop in layout.token_slices(x.shape[0], chunk_tokens)]


def add_shared_(target: Tensor, hidden: Tensor, weights: Weights, how: Ungated | None = None) -> None:
    """target [n, H] += the shared experts of hidden [n, H], times their gate where there is one."""
    gate = weights.get("moe.shared_gate.weight")
    if gate is None:
        add_ffn_(target, hidden, weights, "moe.shared", how)
        return
    out = torch.zeros_like(hidden)
    add_ffn_(out, hidden, weights, "moe.shared", how)
    target.addcmul_(out, (hidden @ gate.t()).sigmoid_())


def shared_backward(
    grad: Tensor, hidden: Tensor, weights: Weights, grads: Weights, how: Ungated | None = None
) -> Tensor:
    """Gradient of hidden [n, H] from that of the output; grads += the weights'. With a gate g, the output is
    g f(h): f is run again for the gate's gradient <grad, f> g (1 - g).
    """
    gate = weights.get("moe.shared_gate.weight")
    if gate is None:
        return ffn_backward(grad, hidden, weights, grads, "moe.shared", how)
    share = (hidden @ gate.t()).sigmoid_()
    out = torch.zeros_like(hidden)
    add_ffn_(out, hidden, weights, "moe.shared", how)
    grad_logit = out.mul_(grad).sum(-1, keepdim=True).mul_(share).mul_(1 - share)
    del out
    grad_hidden = ffn_backward(grad * share, hidden, weights, grads, "moe.shared", how)
    add_matmul(grads["moe.shared_gate.weight"], grad_logit.t(), hidden)
    return grad_hidden.addmm_(grad_logit, gate)
