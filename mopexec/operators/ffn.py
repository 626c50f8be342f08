"""Dense SwiGLU and shared experts over token slices, each slice recomputed in its own backward."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.measure.tracker import component, phase
from mopexec.operators import kernels
from mopexec.operators.fused import OPS
from mopexec.operators.rows import add_matmul, rms_norm, rms_norm_backward_
from mopexec.operators.swiglu import swiglu_activation, swiglu_activation_backward
from mopsim.spec import layout

Weights = dict[str, Tensor]


class DenseBlock:
    """The FFN half of a dense layer: x2 = x1 + ffn(norm(x1)), `chunk_tokens` tokens at a time (0 = all)."""

    def __init__(self, chunk_tokens: int, eps: float) -> None:
        self.chunk_tokens, self.eps = chunk_tokens, eps

    def forward_(self, x: Tensor, weights: Weights) -> None:
        """x1 [N, H] becomes x2 in place."""
        with component("dense_ffn"):
            for start, stop in layout.token_slices(x.shape[0], self.chunk_tokens):
                hidden = rms_norm(x[start:stop], weights["ffn_norm.weight"], self.eps)
                add_swiglu_(x[start:stop], hidden, weights, "ffn")
                del hidden

    def backward(self, grad: Tensor, x: Tensor, weights: Weights, grads: Weights) -> None:
        """grad [N, H] of x2 becomes that of x1 in place; x is x1; grads += the weights'."""
        with component("dense_ffn"), phase("backward"):
            for start, stop in layout.token_slices(x.shape[0], self.chunk_tokens):
                hidden = rms_norm(x[start:stop], weights["ffn_norm.weight"], self.eps)
                grad_hidden = swiglu_backward(grad[start:stop], hidden, weights, grads, "ffn")
                del hidden
                rms_norm_backward_(
                    grad[start:stop], x[start:stop], grad_hidden, weights["ffn_norm.weight"],
                    grads["ffn_norm.weight"], self.eps,
                )  # fmt: skip
                del grad_hidden


def add_swiglu_(target: Tensor, hidden: Tensor, weights: Weights, prefix: str) -> None:
    """target [n, H] += SwiGLU of hidden [n, H]. Temporaries: 2 n I."""
    gate = hidden @ weights[f"{prefix}.gate_proj.weight"].t()
    up = hidden @ weights[f"{prefix}.up_proj.weight"].t()
    if kernels.NOW.activation:
        OPS.swiglu_(gate, up, None, 0.0, 0.0)
        inner = gate
    else:
        inner = swiglu_activation(gate, up)
    del up
    target.addmm_(inner, weights[f"{prefix}.down_proj.weight"].t())


def swiglu_backward(grad: Tensor, hidden: Tensor, weights: Weights, grads: Weights, prefix: str) -> Tensor:
    """Gradient of hidden [n, H] from that of the output, recomputing the inner products; grads += the
    weights'.

    Temporaries: 5 n I, then 4 n I and the result; fused: 3 n I, then 2 n I and the result.
    """
    gate = hidden @ weights[f"{prefix}.gate_proj.weight"].t()
    up = hidden @ weights[f"{prefix}.up_proj.weight"].t()
    if kernels.NOW.activation:
        grad_inner = grad @ weights[f"{prefix}.down_proj.weight"]
        OPS.swiglu_backward_(grad_inner, gate, up, None, 0.0, 0.0)
        add_matmul(grads[f"{prefix}.down_proj.weight"], grad.t(), grad_inner)
        grad_gate, grad_up = gate, up
    else:
        silu = F.silu(gate)
        inner = silu * up
        add_matmul(grads[f"{prefix}.down_proj.weight"], grad.t(), inner)
        del inner
        grad_inner = grad @ weights[f"{prefix}.down_proj.weight"]
        grad_gate, grad_up = swiglu_activation_backward(grad_inner, gate, up, silu)
        del silu
    del gate, up, grad_inner
    add_matmul(grads[f"{prefix}.gate_proj.weight"], grad_gate.t(), hidden)
    add_matmul(grads[f"{prefix}.up_proj.weight"], grad_up.t(), hidden)
    return (grad_gate @ weights[f"{prefix}.gate_proj.weight"]).addmm_(
        grad_up, weights[f"{prefix}.up_proj.weight"]
    )


def slice_rows(x: Tensor, chunk_tokens: int) -> list[Tensor]:
    """x [n, H] (any strides) as views of at most `chunk_tokens` rows."""
    return [x[start:stop] for start, stop in layout.token_slices(x.shape[0], chunk_tokens)]


def add_shared_(target: Tensor, hidden: Tensor, weights: Weights) -> None:
    """target [n, H] += the shared experts of hidden [n, H], times their gate where there is one."""
    gate = weights.get("moe.shared_gate.weight")
    if gate is None:
        add_swiglu_(target, hidden, weights, "moe.shared")
        return
    out = torch.zeros_like(hidden)
    add_swiglu_(out, hidden, weights, "moe.shared")
    target.addcmul_(out, (hidden @ gate.t()).sigmoid_())


def shared_backward(grad: Tensor, hidden: Tensor, weights: Weights, grads: Weights) -> Tensor:
    """Gradient of hidden [n, H] from that of the output; grads += the weights'. With a gate g, the output is
    g f(h): f is run again for the gate's gradient <grad, f> g (1 - g).
    """
    gate = weights.get("moe.shared_gate.weight")
    if gate is None:
        return swiglu_backward(grad, hidden, weights, grads, "moe.shared")
    share = (hidden @ gate.t()).sigmoid_()
    out = torch.zeros_like(hidden)
    add_swiglu_(out, hidden, weights, "moe.shared")
    grad_logit = out.mul_(grad).sum(-1, keepdim=True).mul_(share).mul_(1 - share)
    del out
    grad_hidden = swiglu_backward(grad * share, hidden, weights, grads, "moe.shared")
    add_matmul(grads["moe.shared_gate.weight"], grad_logit.t(), hidden)
    return grad_hidden.addmm_(grad_logit, gate)
