"""Row operations as one op each (`torch.ops.mop`): torch's own fused kernels or a compiled function on CUDA.

On a CPU the same function runs as eager torch composes it; tensors without data get the results' shapes. So a
dispatch mode sees on a machine without a GPU what a GPU would launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mopexec.operators import compiler
from mopexec.operators.dtypes import wide
from mopexec.operators.weighted_inputs import take_weighted_, weigh_
from mopsim.spec import layout

_LIBRARY: Any = torch.library.Library("mop", "DEF")  # type: ignore[no-untyped-call]
Leaf = Callable[..., Any]
LEAVES: dict[str, Leaf] = {}
"""Functions that are compiled on CUDA, by the name of their op."""


def define(
    schema: str, leaf: Leaf, meta: Leaf, cuda: Leaf | None = None, compiled: Leaf | None = None
) -> None:
    """An op. cuda: where nothing is compiled; compiled: where it is not the leaf."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, leaf, "CPU")
    _LIBRARY.impl(name, meta, "Meta")
    if cuda is None:
        LEAVES[name] = compiled or leaf
        cuda = compiler.compiled(LEAVES[name], dynamic=True)
    _LIBRARY.impl(name, cuda, "CUDA")


def nothing(*_: Any) -> None:
    return None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    accurate = wide(x.dtype)
    rows = x.to(accurate)
    return (rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(accurate)).to(x.dtype)


def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    result: Tensor = torch.ops.aten._fused_rms_norm(x.contiguous(), list(weight.shape), weight, eps)[0]
    return result


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (x.to(wide(x.dtype)).square().mean(-1, keepdim=True) + eps).rsqrt()


def _rms_norm_backward_(
    target: Tensor, x: Tensor, grad: Tensor, weight: Tensor, grad_weight: Tensor, eps: float, add: bool
) -> None:
    """See `rows.rms_norm_backward_`; grad of any dtype."""
    inverse = _inverse_rms(x, eps)
    normed, scaled = x * inverse, grad * weight.to(inverse.dtype)
    product = grad * normed
    dx = ((scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse).to(target.dtype)
    total = product.sum(tuple(range(x.dim() - 1)))
    if add:
        target.add_(dx)
    else:
        target.copy_(dx)
    grad_weight.add_(total.to(weight.dtype))


def _turned(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The halves of what turns of x after rotation, in the dtype of the tables, fp32 at least."""
    first, second = x[..., : 2 * cos.shape[-1]].chunk(2, dim=-1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if inverse:
        s = -s
    return first * c - second * s, second * c + first * s


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """See `rope.rotate_`."""
    turns = x[..., : 2 * cos.shape[-1]].chunk(2, dim=-1)
    for half, turned in zip(turns, _turned(x, cos, sin, inverse), strict=True):
        half.copy_(turned)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """As `rotate_`, into a new tensor, the elements of x that do not turn as they are."""
    found, width = torch.empty_like(x, memory_format=torch.contiguous_format), 2 * cos.shape[-1]
    turns = found[..., :width].chunk(2, dim=-1)
    for half, turned in zip(turns, _turned(x, cos, sin, inverse), strict=True):
        half.copy_(turned)
    if width < x.shape[-1]:
        found[..., width:].copy_(x[..., width:])
    return found


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, a new tensor."""
    return _activated(gate, up, 0.0, 0.0)[2].to(gate.dtype)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    accurate = wide(gate.dtype)
    given, wider = grad.to(accurate), gate.to(accurate)
    sigmoid = torch.sigmoid(wider)
    grad_gate = given * up.to(accurate) * sigmoid * (1 + wider * (1 - sigmoid))
    return grad_gate.to(gate.dtype), (given * wider * sigmoid).to(up.dtype)


def _swiglu_(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float, alpha: float) -> None:
    """gate [R, I] = activation of gate and up, times weight [R] where given."""
    _, _, inner = _activated(gate, up, limit, alpha)
    gate.copy_(inner if weight is None else inner * weight[:, None])


def _activated(gate: Tensor, up: Tensor, limit: float, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """(gated, up) that are multiplied, and their product, in the wide dtype."""
    accurate = wide(gate.dtype)
    gate, up = gate.to(accurate), up.to(accurate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        gated = gate * torch.sigmoid(gate * alpha)
    else:
        gated = gate * torch.sigmoid(gate)
    return gated, up, gated * up


def _swiglu_backward_(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float, alpha: float
) -> Tensor:
    """grad [R, I], of the product after the route weight, becomes that product; gate and up their gradients.

    Returns the gradient of weight [R], in the wide dtype; [0] without one.
    """
    accurate = wide(gate.dtype)
    gated, factor, inner = _activated(gate, up, limit, alpha)
    given = grad.to(accurate)
    total = given.new_empty(0)
    if weight is not None:
        total, share = (inner * given).sum(-1), weight.to(accurate)[:, None]
        given, inner = given * share, inner * share
    bounded = gate.to(accurate)
    if limit:
        bounded = bounded.clamp(max=limit)
    steep = alpha if limit else 1.0
    sigmoid = torch.sigmoid(bounded * steep)
    slope = sigmoid * (1 + bounded * steep * (1 - sigmoid))
    grad_gate, grad_up = given * factor * slope, given * gated
    if limit:
        grad_gate = torch.where(gate <= limit, grad_gate, 0.0)
        grad_up = torch.where(up.abs() <= limit, grad_up, 0.0)
    gate.copy_(grad_gate)
    up.copy_(grad_up)
    grad.copy_(inner)
    return total


def _router_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    accurate = wide(hidden.dtype)
    product = hidden.to(accurate) @ weight.to(accurate).t()
    return product if bias is None else product + bias.to(accurate)


def _router_logits_cuda(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """bf16 products summed in fp32 are those of the casts: no fp32 copy of the input is made."""
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return _router_logits(hidden, weight, bias)
    product = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return product if bias is None else product.add_(bias)


def _route_weights(logits: Tensor, experts: Tensor, softmax: bool, normed: bool, scale: float) -> Tensor:
    """See `router.route_weights`, from logits; experts [n, k] of any integer dtype."""
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    chosen = scores.gather(1, experts.long())
    if normed:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * scale


def _route_weights_backward(
    grad: Tensor, logits: Tensor, experts: Tensor, softmax: bool, normed: bool, scale: float
) -> Tensor:
    """See `router.route_weights_backward`, from logits and without a scatter."""
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    index, grad = experts.long(), grad * scale
    if normed:
        chosen = scores.gather(1, index)
        total = chosen.sum(-1, keepdim=True) + 1e-20
        grad = (grad - (grad * chosen).sum(-1, keepdim=True) / total) / total
    place = torch.arange(logits.shape[1], device=logits.device)
    grad_scores = torch.where(index[:, :, None] == place, grad[:, :, None], 0.0).sum(1)
    if softmax:
        return (grad_scores - (grad_scores * scores).sum(-1, keepdim=True)) * scores
    return grad_scores * scores * (1 - scores)


def _add_routes_(target: Tensor, rows: Tensor, inverse: Tensor, top_k: int) -> None:
    """target [n, H] += the sum of each token's rows; inverse [n * top_k]: their places among rows."""
    gathered = rows[inverse].view(target.shape[0], top_k, target.shape[1])
    target.add_(gathered.sum(1, dtype=wide(target.dtype)).to(target.dtype))


def _take_routes_(
    grad_weights: Tensor, rows: Tensor, of_weights: Tensor, inverse: Tensor, top_k: int
) -> Tensor:
    """The sum of each token's rows, [n, H], as `add_routes_` adds it to zeros; grad_weights [n, top_k] =
    of_weights [n * top_k] of each route.
    """
    grad_weights.copy_(of_weights[inverse].view(grad_weights.shape))
    gathered = rows[inverse].view(-1, top_k, rows.shape[1])
    return gathered.sum(1, dtype=wide(rows.dtype)).to(rows.dtype)


def split_packed(packed: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """(rows [R, hidden], route weights [R] in the wide dtype), views of packed rows: `layout.packed_row`."""
    accurate, size = wide(packed.dtype), packed.element_size()
    start = packed.shape[1] - layout.PACK_BYTES // size
    return packed[:, :hidden], packed[:, start : start + accurate.itemsize // size].view(accurate)[:, 0]


def _packed(x: Tensor, num_rows: int) -> Tensor:
    """Packed rows without values."""
    size = x.element_size()
    return x.new_empty(num_rows, layout.packed_row(x.shape[1] * size) // size)


def _pack_routes(
    x: Tensor, scale: Tensor | None, eps: float, grad: Tensor | None, weights: Tensor, order: Tensor,
    top_k: int, weighted: bool,
) -> list[Tensor]:  # fmt: skip
    """Packed rows (see `split_packed`) of the routes of `order`, token and slot in one: the row of x [n, H],
    normed where a scale is given, and the weight of weights [n, top_k], which has multiplied the row and is 1
    where `weighted`. Then the rows of grad where given.
    """
    token = order // top_k
    packed = _packed(x, order.shape[0])
    rows, own = split_packed(packed, x.shape[1])
    torch.index_select(x if scale is None else _rms_norm(x, scale, eps), 0, token, out=rows)
    own.copy_(weights[token, order % top_k])
    if weighted:
        weigh_(rows, own)
    return [packed] if grad is None else [packed, grad.index_select(0, token)]


def _pack_routes_compiled(
    x: Tensor, scale: Tensor | None, eps: float, grad: Tensor | None, weights: Tensor, order: Tensor,
    top_k: int, weighted: bool,
) -> list[Tensor]:  # fmt: skip
    """A row is normed where it is gathered: no normed copy of x is made."""
    token = order // top_k
    rows = x[token] if scale is None else _rms_norm(x[token], scale, eps)
    own = weights[token, order % top_k]
    if weighted:
        rows, own = (rows * own[:, None]).to(rows.dtype), torch.ones_like(own)
    packed = _joined(rows, own)
    return [packed] if grad is None else [packed, grad[token]]


def _pack_routes_meta(x: Tensor, *others: Any) -> list[Tensor]:
    grad, order = others[2], others[4]
    given = [] if grad is None else [x.new_empty(order.shape[0], x.shape[1])]
    return [_packed(x, order.shape[0]), *given]


def _joined(rows: Tensor, weights: Tensor) -> Tensor:
    """Packed rows, by one concatenation."""
    count, hidden, size = *rows.shape, rows.element_size()
    bits, width = weights[:, None].view(rows.dtype), layout.packed_row(hidden * size) // size
    start = width - layout.PACK_BYTES // size
    gaps = [rows.new_zeros(count, gap) for gap in (start - hidden, width - start - bits.shape[1])]
    return torch.cat([rows, gaps[0], bits, gaps[1]], dim=1)


def _pack_back(rows: Tensor, weights: Tensor, order: Tensor | None) -> Tensor:
    """Packed rows of rows [R, H] and weights [R], row i at order[i]."""
    packed = _packed(rows, rows.shape[0])
    for target, source in zip(split_packed(packed, rows.shape[1]), (rows, weights), strict=True):
        if order is None:
            target.copy_(source)
        else:
            target.index_copy_(0, order, source)
    return packed


def _pack_back_compiled(rows: Tensor, weights: Tensor, order: Tensor | None) -> Tensor:
    packed = _joined(rows, weights)
    return packed if order is None else torch.empty_like(packed).index_copy_(0, order, packed)


def _route_cells(experts: Tensor, chunks: int, num_experts: int) -> Tensor:
    """(chunk, expert) of each route as one number [n * top_k] int32, of strided chunks of experts
    [n, top_k].
    """
    chunk = torch.arange(experts.shape[0], device=experts.device, dtype=torch.int32) % chunks
    return (experts.int() + (chunk * num_experts)[:, None]).flatten()


def _chunk_orders(order: Tensor, chunks: int, top_k: int) -> tuple[Tensor, Tensor]:
    """From the order [n * top_k] of all routes by chunk: that of each chunk's own, chunk after chunk, and
    where each of them went.
    """
    num_tokens = order.shape[0] // top_k
    token, place = order // top_k, torch.arange(order.shape[0], device=order.device)
    chunk = token % chunks
    start = top_k * (chunk * (num_tokens // chunks) + chunk.clamp(max=num_tokens % chunks))
    own = token // chunks * top_k + order % top_k
    return own, torch.empty_like(order).scatter_(0, start + own, place - start)


def _arrival_order(arrived: Tensor, total: int) -> Tensor:
    """See `grouped.expert_order`: a block (source, expert) of arrivals moves as a whole."""
    counts = arrived.transpose(-1, -2).reshape(-1)
    before = arrived.flatten(-2).cumsum(-1).view_as(arrived) - arrived
    starts, ends = before.transpose(-1, -2).reshape(-1), counts.cumsum(0)
    place = torch.arange(total, device=arrived.device)
    block = torch.searchsorted(ends, place, right=True)
    return place + (starts - ends + counts)[block]


def _rms_norm_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_meta, _rms_norm_cuda)
define("rms_norm_strided(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_meta)
define("rms_norm_backward_(Tensor(a!) target, Tensor x, Tensor grad, Tensor weight, Tensor(b!) grad_weight, "
       "float eps, bool add) -> ()", _rms_norm_backward_, nothing)  # fmt: skip
define("rotate_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()", _rotate_, nothing)
define("rotate(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", _rotate,
        lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device="meta"))  # fmt: skip
define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, lambda gate, up: torch.empty_like(gate))
define("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _swiglu_backward,
        lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)))  # fmt: skip
define("swiglu_(Tensor(a!) gate, Tensor up, Tensor? weight, float limit, float alpha) -> ()",
        _swiglu_, nothing)  # fmt: skip
define("swiglu_backward_(Tensor(a!) grad, Tensor(b!) gate, Tensor(c!) up, Tensor? weight, float limit, "
        "float alpha) -> Tensor", _swiglu_backward_,
        lambda grad, gate, up, weight, *_: torch.empty(
            0 if weight is None else grad.shape[0], dtype=wide(grad.dtype), device="meta"
        ))  # fmt: skip
define("router_logits(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor", _router_logits,
        lambda hidden, weight, bias: torch.empty(
            (hidden.shape[0], weight.shape[0]), dtype=wide(hidden.dtype), device="meta"
        ), _router_logits_cuda)  # fmt: skip
define("route_weights(Tensor logits, Tensor experts, bool softmax, bool normed, float scale) -> Tensor",
        _route_weights,
        lambda logits, experts, *_: torch.empty(
            experts.shape, dtype=logits.dtype, device="meta"
        ))  # fmt: skip
define("route_weights_backward(Tensor grad, Tensor logits, Tensor experts, bool softmax, bool normed, "
        "float scale) -> Tensor", _route_weights_backward,
        lambda grad, logits, *_: torch.empty_like(logits))  # fmt: skip
define("add_routes_(Tensor(a!) target, Tensor rows, Tensor inverse, int top_k) -> ()",
        _add_routes_, nothing)  # fmt: skip
define("take_routes_(Tensor(a!) grad_weights, Tensor rows, Tensor of_weights, Tensor inverse, int top_k) "
        "-> Tensor", _take_routes_,
        lambda grad_weights, rows, *_: rows.new_empty(grad_weights.shape[0], rows.shape[1]))  # fmt: skip
define("take_weighted_(Tensor(a!) grad_weights, Tensor rows, Tensor x, Tensor weights, Tensor inverse, "
        "int top_k) -> Tensor", take_weighted_,
        lambda grad_weights, rows, x, *_: torch.empty_like(x))  # fmt: skip
define("pack_routes(Tensor x, Tensor? scale, float eps, Tensor? grad, Tensor weights, Tensor order, "
        "int top_k, bool weighted) -> Tensor[]", _pack_routes, _pack_routes_meta,
        compiled=_pack_routes_compiled)  # fmt: skip
define("pack_back(Tensor rows, Tensor weights, Tensor? order) -> Tensor", _pack_back,
        lambda rows, *_: _packed(rows, rows.shape[0]), compiled=_pack_back_compiled)  # fmt: skip
define("route_cells(Tensor experts, int chunks, int num_experts) -> Tensor", _route_cells,
        lambda experts, *_: experts.new_empty(experts.numel(), dtype=torch.int32))  # fmt: skip
define("chunk_orders(Tensor order, int chunks, int top_k) -> (Tensor, Tensor)", _chunk_orders,
        lambda order, *_: (torch.empty_like(order), torch.empty_like(order)))  # fmt: skip
define("arrival_order(Tensor arrived, int total) -> Tensor", _arrival_order,
        lambda arrived, total: arrived.new_empty(total))  # fmt: skip

OPS: Any = torch.ops.mop
