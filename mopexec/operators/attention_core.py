"""Causal attention in O(N) memory, called explicitly so that no backend is chosen behind our back.

Which kernel runs says `kernels.attention`. Shapes: q [B, S, heads, d], k [B, S, kv_heads, d], v [B, S,
kv_heads, e]. The kernels take one width for all three: the narrower ones are padded with zeros on the way in.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from mopexec.operators import attention_rows, cudnn, kernels
from mopexec.operators import sinks as attention_sinks
from mopexec.operators.documents import Documents, cumulative, spans
from mopexec.operators.rope import softmax_scale
from mopsim.spec.model import ModelSpec

_ATEN: Any = torch.ops.aten
Saved = tuple[Any, ...]


@dataclass(frozen=True)
class Core:
    """What a layer's attention computes beyond its inputs. scale: of the products of queries and keys.
    window: tokens that a query attends to, itself included; 0: all before it. chunk: tokens of the chunks of
    a sequence within which it attends; 0: it is one. documents: that it does not leave. causal: False where
    every query attends to all keys (a block of keys before them).
    """

    scale: float
    window: int = 0
    documents: Documents = ()
    causal: bool = True
    chunk: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, layer: int) -> "Core":
        """Of a layer of the network."""
        width, chunked = spec.window(layer), spec.attention_chunk_size > 0
        return cls(softmax_scale(spec), 0 if chunked else width, chunk=width if chunked else 0)

    def over(self, q: Tensor) -> "Core":
        """The same for queries [B, S, ..]: chunks are documents, which begin anew with each that there is."""
        batch, length = q.shape[:2]
        if not 0 < self.chunk < length:
            return self
        return replace(
            self, documents=_in_chunks(self.documents or ((length,),) * batch, self.chunk), chunk=0
        )


@functools.lru_cache(maxsize=4)
def _in_chunks(documents: Documents, chunk: int) -> Documents:
    def cut(start: int, end: int) -> tuple[int, ...]:
        return (*range(start + chunk, end, chunk), end)

    return tuple(tuple(chain.from_iterable(map(cut, (0, *ends), ends))) for ends in documents)


def causal_forward(
    q: Tensor, k: Tensor, v: Tensor, core: Core, sinks: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """(out [B, S, heads, e], saved for the backward: log-sum-exps and, of flash on a GPU, the random state).

    sinks: a logit for each query head that takes attention away.
    """
    core = core.over(q)
    if core.documents and not _packed_kernel(q):
        return _documents_forward(q, k, v, core, sinks)
    width = max(q.shape[-1], v.shape[-1])
    forward = _pair(q, core, sinks)[0]
    out, saved = forward(_padded(q, width), _padded(k, width), _padded(v, width), core)
    if out.shape[-1] > v.shape[-1]:
        out = out[..., : v.shape[-1]].contiguous()
    if sinks is not None:
        saved = attention_sinks.join_(_row_of(out, core), saved, sinks)
    return out, saved


def causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, core: Core,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the sinks from that of `out`; all as the inputs' shapes."""
    core = core.over(q)
    if core.documents and not _packed_kernel(q):
        return _documents_backward(grad, q, k, v, out, saved, core, sinks)
    grad_sinks = None
    if sinks is not None:
        grad_sinks = attention_sinks.backward(_row_of(grad, core), _row_of(out, core), saved, sinks)
    width = max(q.shape[-1], v.shape[-1])
    backward = _pair(q, core, sinks)[1]
    grad, query, key, value, out = (_padded(t, width) for t in (grad, q, k, v, out))
    dq, dk, dv = backward(grad, query, key, value, out, saved, core)
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]], grad_sinks


def _pair(q: Tensor, core: Core, sinks: Tensor | None) -> tuple[Any, Any]:
    """Forward and backward of the planned kernel; cuDNN's knows no windows, documents or sinks here."""
    kernel = kernels.attention(q)
    if kernel == "cpu":
        return _cpu_forward, _cpu_backward
    if kernel == "rows":
        return attention_rows.forward, attention_rows.backward
    plain = sinks is None and not core.documents and not _windowed(q, core)
    if kernel == "cudnn" and plain:
        return _cudnn_forward, _cudnn_backward
    return _cuda_forward, _cuda_backward


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, core: Core) -> tuple[Tensor, Saved]:
    return cudnn.forward(q, k, v, core.scale, core.causal)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, core: Core
) -> tuple[Tensor, Tensor, Tensor]:
    inside = [] if q.is_cuda else _workspace(q, k)
    grads = cudnn.backward(grad, q, k, v, out, saved, core.scale, core.causal)
    del inside
    return grads


def _packed_kernel(q: Tensor) -> bool:
    """Whether one kernel takes all documents of a microbatch, by their ends."""
    return kernels.attention(q) not in ("cpu", "rows")


def _row_of(x: Tensor, core: Core) -> Tensor:
    """x [B, S, heads, d] as the log-sum-exps [b, heads, s] lie: of packed documents all sequences are one."""
    return x.flatten(0, 1)[None] if core.documents else x


def _documents_forward(
    q: Tensor, k: Tensor, v: Tensor, core: Core, sinks: Tensor | None
) -> tuple[Tensor, Saved]:
    """`causal_forward` of one document after the other. Saved: how many values are each document's, and they
    (the kernel of a window saves other ones than that of a document which the window holds).
    """
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    alone, saved, sizes = replace(core, documents=()), list[Any](), list[int]()
    for at in spans(core.documents):
        part, sums = causal_forward(q[at], k[at], v[at], alone, sinks)
        out[at].copy_(part)
        del part
        saved.extend(sums)
        sizes.append(len(sums))
    return out, (tuple(sizes), *saved)


def _documents_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, core: Core,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    alone, found = replace(core, documents=()), [torch.empty_like(t) for t in (q, k, v)]
    grad_sinks = None if sinks is None else torch.zeros_like(sinks)
    sizes, *values = saved
    rest = iter(values)
    for at, size in zip(spans(core.documents), sizes, strict=True):
        sums = tuple(islice(rest, size))
        parts = causal_backward(grad[at], q[at], k[at], v[at], out[at], sums, alone, sinks)
        for whole, part in zip(found, parts[:3], strict=True):
            whole[at].copy_(part)
        if grad_sinks is not None and parts[3] is not None:
            grad_sinks.add_(parts[3])
        del parts, part  # before those of the next one are there
    return found[0], found[1], found[2], grad_sinks


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, core: Core) -> tuple[Tensor, Saved]:
    repeats = q.shape[2] // k.shape[2]
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    if repeats == 1 and not _windowed(q, core):
        out, lse = _op(q.transpose(1, 2), key, value, core, None)
        return out.transpose(1, 2), (lse,)
    result = torch.empty_like(q)
    sums = []
    for query, part in zip(_by_repeat(q, repeats), _by_repeat(result, repeats), strict=True):
        pieces = []
        for rows, keys, mask in _blocks(q, core):
            out, lse = _op(query[:, :, rows], key[:, :, keys], value[:, :, keys], core, mask)
            part[:, :, rows].copy_(out)
            pieces.append(lse)
            del mask, out, lse
        sums.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1))
    return result, tuple(sums)


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, core: Core
) -> tuple[Tensor, Tensor, Tensor]:
    repeats = q.shape[2] // k.shape[2]
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    if repeats == 1 and not _windowed(q, core):
        whole = (grad.transpose(1, 2), q.transpose(1, 2), key, value, out.transpose(1, 2))
        grads = _op_backward(*whole, saved[0], core, None)
        return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)
    grad_q = torch.empty_like(q)
    grad_k = grad_v = None
    views = (_by_repeat(t, repeats) for t in (grad, q, out, grad_q))
    for (grad_out, query, output, part), lse in zip(zip(*views, strict=True), saved, strict=True):
        for rows, keys, mask in _blocks(q, core):
            dq, dk, dv = _op_backward(
                grad_out[:, :, rows], query[:, :, rows], key[:, :, keys], value[:, :, keys],
                output[:, :, rows], lse[:, :, rows], core, mask,
            )  # fmt: skip
            part[:, :, rows].copy_(dq)
            grad_k, grad_v = _added(grad_k, dk, key, keys), _added(grad_v, dv, value, keys)
            del dq, dk, dv, mask
    assert grad_k is not None
    assert grad_v is not None
    return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def _added(total: Tensor | None, part: Tensor, like: Tensor, keys: slice) -> Tensor:
    """The gradients of keys (or values) so far with those of one block of them."""
    if total is None:
        if part.shape == like.shape:
            return part
        total = torch.zeros_like(like)
    total[:, :, keys].add_(part)
    return total


def _windowed(q: Tensor, core: Core) -> bool:
    return 0 < core.window < q.shape[1]


def _blocks(q: Tensor, core: Core) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys that they attend to, mask [queries, keys] of what is added to their products) of each
    block of a window's queries; all at once without a window.
    """
    length, window = q.shape[1], core.window
    if not _windowed(q, core):
        yield slice(0, length), slice(0, length), None
        return
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        seen = torch.ones((stop - start, stop - first), dtype=q.dtype, device=q.device)
        seen.tril_(start - first)  # no keys ahead, and none that the window has left
        mask = seen.triu_(start - first - window + 1).log_()
        del seen
        yield slice(start, stop), slice(first, stop), mask
        del mask  # before that of the next block is there


def _op(query: Tensor, key: Tensor, value: Tensor, core: Core, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, core.causal and mask is None, attn_mask=mask, scale=core.scale
    )
    return out, lse


def _op_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, core: Core,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads: tuple[Tensor, Tensor, Tensor] = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, core.causal and mask is None, attn_mask=mask, scale=core.scale
    )
    return grads


def _by_repeat(x: Tensor, repeats: int) -> list[Tensor]:
    """Query heads by their place among those that share a KV head: `repeats` views [B, kv_heads, S, d] of [B,
    S, heads, d].

    Running them one after the other needs no expanded keys, and no expanded gradients of keys.
    """
    batch, seq, heads, size = x.shape
    grouped = x.view(batch, seq, heads // repeats, repeats, size)
    return [grouped[:, :, :, index].transpose(1, 2) for index in range(repeats)]


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, core: Core) -> tuple[Tensor, Saved]:
    """The op of torch's scaled_dot_product_attention; the one below it for a window or documents, which takes
    them: of documents [B * S, heads, d], one behind the other.
    """
    if core.documents:
        ends, longest = _ends(core, q)
        out, *rest = _ATEN._flash_attention_forward(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, longest, longest, 0.0, True, False,
            scale=core.scale, **_sides(q, core),
        )  # fmt: skip
        return out.view(q.shape), (rest[0][None], *rest[1:3], ends)
    if _windowed(q, core):
        out, *rest = _ATEN._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=core.scale, **_sides(q, core)
        )
        return out, tuple(rest[:3])
    out, *rest = _ATEN._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, core.causal, scale=core.scale
    )
    return out.transpose(1, 2), tuple(rest[:7])


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, core: Core
) -> tuple[Tensor, Tensor, Tensor]:
    inside = [] if q.is_cuda else _workspace(q, k)
    if core.documents:
        lse, seed, unused, ends = saved
        longest = _ends(core, q)[1]
        flat = (t.flatten(0, 1) for t in (grad, q, k, v, out))
        found = _ATEN._flash_attention_backward(
            *flat, lse[0], ends, ends, longest, longest, 0.0, True, seed, unused, scale=core.scale,
            **_sides(q, core),
        )  # fmt: skip
        del inside
        return found[0].view(q.shape), found[1].view(k.shape), found[2].view(v.shape)
    if _windowed(q, core):
        lse, seed, unused = saved
        grads: tuple[Tensor, Tensor, Tensor] = _ATEN._flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, True, seed, unused,
            scale=core.scale, **_sides(q, core),
        )  # fmt: skip
        del inside
        return grads
    lse, cum_q, cum_k, max_q, max_k, seed, offset = saved
    dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
        grad.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2),
        lse, cum_q, cum_k, max_q, max_k, 0.0, core.causal, seed, offset, scale=core.scale,
    )  # fmt: skip
    del inside
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _ends(core: Core, q: Tensor) -> tuple[Tensor, int]:
    """`cumulative` of the documents; tensors without data are of one run alone, and not kept for another."""
    found = cumulative.__wrapped__ if isinstance(q, FakeTensor) else cumulative
    return found(core.documents, q.device)


def _sides(q: Tensor, core: Core) -> dict[str, int]:
    """Tokens before and after a query that the kernel lets it attend to."""
    return {"window_size_left": core.window - 1, "window_size_right": 0} if _windowed(q, core) else {}


def _workspace(q: Tensor, k: Tensor) -> list[Tensor]:
    """What FlashAttention-2's backward allocates inside, played where no kernel runs: dq and its row sums in
    fp32, and dk and dv of every query head (flash_attn/flash_api.cpp: mha_bwd). cuDNN's workspace has these
    too (cudnn_frontend, scaled_dot_product_flash_attention.h).
    """
    batch, seq, heads, _ = q.shape
    inside = [torch.empty(q.shape, dtype=torch.float32, device=q.device)]
    inside.append(torch.empty((batch, heads, seq), dtype=torch.float32, device=q.device))
    if k.shape[2] != heads:
        inside += [torch.empty_like(q), torch.empty_like(q)]
    return inside
