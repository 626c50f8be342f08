"""cuDNN's attention kernel, as torch's scaled_dot_product_attention calls it: half precision, causal or not.

Shapes as in `attention_core`; grouped KV heads are the kernel's own. Chosen by a stack's `kernels.attention`.
"""

from typing import Any

import torch
from torch import Tensor

_ATEN: Any = torch.ops.aten
Saved = tuple[Any, ...]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Saved]:
    """(out [B, S, heads, d], what the backward needs: log-sum-exps [B, heads, S] first, as of FlashAttention;
    the op's have a dimension of one behind).
    """
    out, lse, *rest = _ATEN._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), (lse.squeeze(-1), *rest[:6])


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. No bias, no ends of documents: what is there, even empty, is taken for one."""
    lse, cum_q, cum_k, max_q, max_k, seed, offset = saved
    dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward(
        grad.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2),
        lse.unsqueeze(-1), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal, scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
