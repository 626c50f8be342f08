"""Causal attention in O(N) memory, called explicitly so that no backend is chosen behind our back.

CPU and fake tensors use the CPU flash op; CUDA uses flash for half precision. CUDA has no flash kernel for
float32 and float64, so there (tests only) the quadratic math kernel stands in. Shapes: q [B, S, heads, d], k
and v [B, S, kv_heads, d].
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

_HALF = (torch.bfloat16, torch.float16)
_ATEN: Any = torch.ops.aten


def causal_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """(out [B, S, heads, d], saved for the backward: the log-sum-exp [B, heads, S] and, on CUDA, the random
    state).
    """
    if q.is_cuda:
        return _cuda_forward(q, k, v) if q.dtype in _HALF else (_math(q, k, v), ())
    repeats = q.shape[2] // k.shape[2]
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    if repeats == 1:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q.transpose(1, 2), key, value, 0.0, True)
        return out.transpose(1, 2), (lse,)
    result = torch.empty_like(q)
    sums = []
    for query, part in zip(_by_repeat(q, repeats), _by_repeat(result, repeats), strict=True):
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
        part.copy_(out)
        sums.append(lse)
    return result, tuple(sums)


def causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out`; all as the inputs' shapes."""
    if q.is_cuda:
        return (
            _cuda_backward(grad, q, k, v, out, saved) if q.dtype in _HALF else _math_backward(grad, q, k, v)
        )
    repeats = q.shape[2] // k.shape[2]
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    backward = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    if repeats == 1:
        grads = backward(
            grad.transpose(1, 2), q.transpose(1, 2), key, value, out.transpose(1, 2), saved[0], 0.0, True
        )
        return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)
    grad_q = torch.empty_like(q)
    grad_k = grad_v = None
    views = (_by_repeat(t, repeats) for t in (grad, q, out, grad_q))
    for (grad_out, query, output, part), lse in zip(zip(*views, strict=True), saved, strict=True):
        dq, dk, dv = backward(grad_out, query, key, value, output, lse, 0.0, True)
        part.copy_(dq)
        grad_k = dk if grad_k is None else grad_k.add_(dk)
        grad_v = dv if grad_v is None else grad_v.add_(dv)
        del dq, dk, dv
    assert grad_k is not None
    assert grad_v is not None
    return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _by_repeat(x: Tensor, repeats: int) -> list[Tensor]:
    """Query heads by their place among those that share a KV head: `repeats` views [B, kv_heads, S, d] of [B,
    S, heads, d].

    Running them one after the other needs no expanded keys, and no expanded gradients of keys.
    """
    batch, seq, heads, size = x.shape
    grouped = x.view(batch, seq, heads // repeats, repeats, size)
    return [grouped[:, :, :, index].transpose(1, 2) for index in range(repeats)]


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    out, *rest = _ATEN._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, True
    )
    return out.transpose(1, 2), tuple(rest[:7])


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    lse, cum_q, cum_k, max_q, max_k, seed, offset = saved
    dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
        grad.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2),
        lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )


def _math_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        dq, dk, dv = torch.autograd.grad(_math(*leaves), leaves, grad)
    return dq, dk, dv


class CausalAttention(torch.autograd.Function):
    """`causal_forward` under autograd: saves q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, saved = causal_forward(q, k, v)
        ctx.plain = [None if isinstance(value, Tensor) else (value,) for value in saved]
        ctx.save_for_backward(q, k, v, out, *(value for value in saved if isinstance(value, Tensor)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        saved = tuple(next(rest) if plain is None else plain[0] for plain in ctx.plain)
        return causal_backward(grads[0], q, k, v, out, saved)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [B, S, heads, d] with grouped KV heads, differentiable."""
    result: Tensor = CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return result
