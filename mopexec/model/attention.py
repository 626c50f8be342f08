"""The attention block: grouped-query or multi-head latent projections, rotary positions, core, output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mopexec.model.kept import product
from mopexec.model.parts import RMSNorm, linear, unweighted_norm
from mopexec.model.parts import norm as normed
from mopexec.operators import kernels
from mopexec.operators.again import kept
from mopexec.operators.attention_core import Core, causal_backward, causal_forward
from mopexec.operators.documents import Documents
from mopexec.operators.fused import OPS
from mopexec.operators.rope import rotate
from mopexec.operators.temperature import tempered
from mopsim.spec.model import ModelSpec

AttentionCore = Callable[[list[Tensor], Core, Tensor | None], Tensor]
"""Attention of [q, k, v], which it takes out of the list: what it trades for others is gone once it has."""
LATENT_EPS = 1e-6
"""Of the norms over latents: the default of DeepSeek's RMSNorm, whatever its config says (model code of
DeepSeek-V2 and V3)."""


class CausalAttention(torch.autograd.Function):
    """`causal_forward` under autograd: saves q, k, v, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, core: Core) -> Tensor:
        out, saved = kept(partial(causal_forward, q, k, v, core, sinks), "attention_core")
        ctx.core, ctx.sinks = core, sinks is not None
        ctx.plain = [None if isinstance(value, Tensor) else (value,) for value in saved]
        tensors = (value for value in saved if isinstance(value, Tensor))
        ctx.save_for_backward(q, k, v, out, *([] if sinks is None else [sinks]), *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, *tensors = ctx.saved_tensors
        sinks = tensors.pop(0) if ctx.sinks else None
        rest = iter(tensors)
        saved = tuple(next(rest) if plain is None else plain[0] for plain in ctx.plain)
        return *causal_backward(grads[0], q, k, v, out, saved, ctx.core, sinks), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, core: Core, sinks: Tensor | None = None) -> Tensor:
    """Causal attention [B, S, heads, e] with grouped KV heads, differentiable."""
    result: Tensor = CausalAttention.apply(q, k, v, sinks, core)  # type: ignore[no-untyped-call]
    return result


def attended(parts: list[Tensor], core: Core, sinks: Tensor | None = None) -> Tensor:
    """`causal_attention` as an AttentionCore."""
    q, k, v = parts
    parts.clear()
    return causal_attention(q, k, v, core, sinks)


class _Rotation(torch.autograd.Function):
    """Keeps the tables alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned: Tensor = OPS.rotate(x, cos, sin, False)
        return turned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return OPS.rotate(grads[0], cos, sin, True), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`rotate` under autograd: as torch composes it, or in one kernel each way."""
    if not kernels.NOW.rotary:
        return rotate(x, cos, sin, interleaved)
    width = 2 * cos.shape[-1]
    pairs, rest = (x[..., 0:width:2], x[..., 1:width:2]), x[..., width:]
    halves = torch.cat((*pairs, rest) if rest.shape[-1] else pairs, dim=-1) if interleaved else x
    found: Tensor = _Rotation.apply(halves, cos, sin)  # type: ignore[no-untyped-call]
    return found


class _Tempered(torch.autograd.Function):
    """Keeps the factors alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        return tempered(q, factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tempered(grads[0], *ctx.saved_tensors), None


def _scaled(q: Tensor, factors: Tensor) -> Tensor:
    scaled: Tensor = _Tempered.apply(q, factors)  # type: ignore[no-untyped-call]
    return scaled


class SelfAttention(nn.Module):
    """Causal attention of one layer. `core` may be replaced (sequence parallelism), and `rows` (tensor
    parallelism)."""

    def __init__(self, spec: ModelSpec, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.what, self.rotates = Core.of(spec, layer), spec.rotates(layer)
        self.tempers = spec.tempers(layer)
        (_add_latent if spec.attention == "mla" else _add_grouped)(self, spec, dtype, device)
        width = spec.num_attention_heads * value_width(spec)
        output_bias = spec.attention_bias == "qkvo"
        self.o_proj = linear(width, spec.hidden_size, dtype, device, output_bias)
        self.sinks: nn.Parameter | None = None
        if spec.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(spec.num_attention_heads, dtype=dtype, device=device))
        self.core: AttentionCore = attended
        self.rows: QueryRows = OwnRows()

    def forward(
        self, x: Tensor, norm: Callable[[Tensor], Tensor], cos: Tensor, sin: Tensor,
        documents: Documents = (), factors: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, S, H], before its norm, to [B, S, H]; cos and sin [S, rotated / 2] of the tokens' positions,
        [B, ..] with documents; factors of queries, which this layer takes or not.
        """
        factors = factors if self.tempers else None
        weights = dict(self.named_parameters())
        how: dict[str, Any] = {"rotates": self.rotates, "factors": factors}
        made = project(self.spec, weights, norm(x), cos, sin, self.rows, **how)
        parts = list(made)
        del made
        out = self.core(parts, replace(self.what, documents=documents), self.sinks)
        result: Tensor = self.o_proj(out.flatten(2))
        return result


def value_width(spec: ModelSpec) -> int:
    """Elements of a head's values."""
    return spec.v_head_dim if spec.attention == "mla" else spec.head_dim


def _add_grouped(block: nn.Module, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    size, bias = spec.head_dim, spec.attention_bias != "none"
    widths = {
        "q": spec.num_attention_heads * size,
        "k": spec.num_key_value_heads * size,
        "v": spec.num_key_value_heads * size,
    }
    for name, width in widths.items():
        block.add_module(f"{name}_proj", linear(spec.hidden_size, width, dtype, device, bias))
    for name in "qk" if spec.qk_norm in ("head", "full") else ():
        width = size if spec.qk_norm == "head" else widths[name]
        block.add_module(f"{name}_norm", RMSNorm(width, spec.rms_norm_eps, dtype, device))


def _add_latent(block: nn.Module, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    hidden, heads, rank = spec.hidden_size, spec.num_attention_heads, spec.kv_lora_rank
    if spec.q_lora_rank:
        block.add_module("q_a_proj", linear(hidden, spec.q_lora_rank, dtype, device))
        block.add_module("q_a_norm", RMSNorm(spec.q_lora_rank, LATENT_EPS, dtype, device))
        block.add_module("q_b_proj", linear(spec.q_lora_rank, heads * spec.head_dim, dtype, device))
    else:
        block.add_module("q_proj", linear(hidden, heads * spec.head_dim, dtype, device))
    block.add_module("kv_a_proj", linear(hidden, rank + spec.qk_rope_head_dim, dtype, device))
    block.add_module("kv_a_norm", RMSNorm(rank, LATENT_EPS, dtype, device))
    up = heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    block.add_module("kv_b_proj", linear(rank, up, dtype, device))


Weights = Mapping[str, Tensor]


class QueryRows(Protocol):
    """Which rows the projections of a block take: its own, or those of more ranks."""

    def products(self, weights: Weights, names: Sequence[str], x: Tensor) -> Iterator[Tensor]:
        """x [B, s, in] times each of the named weights, with its bias where it has one."""

    def own(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        """x times one of the weights, of the rank's own rows whatever those of `products`."""

    def whole(self, x: Tensor) -> Tensor:
        """x [B, s, .] as the rows of a product."""


class OwnRows:
    """Rows as they are, one product after the other."""

    def products(self, weights: Weights, names: Sequence[str], x: Tensor) -> Iterator[Tensor]:
        return (self.product(weights, name, x) for name in names)

    def product(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        """x times one of the weights."""
        return _product(weights, name, x)

    def own(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        return _product(weights, name, x)

    def whole(self, x: Tensor) -> Tensor:
        return x


def project(
    spec: ModelSpec, weights: Weights, x: Tensor, cos: Tensor, sin: Tensor, rows: QueryRows | None = None, *,
    rotates: bool = True, factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotated queries [B, S, heads, d] and keys [B, S, kv_heads, d], not rotated where positions are learned,
    and values, of normed x [B, S, H]. factors: of the queries' positions, where the layer scales them.

    weights: of the block, by their names in it; of as many heads as they have.
    """
    given = (spec, weights, x, cos, sin, rows or OwnRows())
    q, k, v = _latent(*given) if spec.attention == "mla" else _grouped(*given, rotates)
    return q if factors is None else _scaled(q, factors), k, v


def _grouped(
    spec: ModelSpec, weights: Weights, x: Tensor, cos: Tensor, sin: Tensor, source: QueryRows, rotates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for name, rows in zip("qkv", source.products(weights, ("q_proj", "k_proj", "v_proj"), x), strict=True):
        norm = weights.get(f"{name}_norm.weight")
        if norm is not None and spec.qk_norm == "full":
            rows = normed(rows, norm, spec.rms_norm_eps)
        rows = rows.unflatten(-1, (-1, spec.head_dim))  # type: ignore[no-untyped-call]
        if norm is not None and spec.qk_norm == "head":
            rows = normed(rows, norm, spec.rms_norm_eps)
        found.append(rows)
        del rows
    for place in range(2) if rotates else ():  # what is rotated goes before the next one is
        found[place] = rotated(found[place], cos, sin, spec.rope_interleave)
    for place in range(2) if rotates and spec.qk_norm == "unweighted" else ():
        found[place] = unweighted_norm(found[place], spec.rms_norm_eps)
    return found[0], found[1], found[2]


def _latent(
    spec: ModelSpec, weights: Weights, x: Tensor, cos: Tensor, sin: Tensor, source: QueryRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values from a latent that they share; one rotated key part for all heads (arXiv
    2405.04434, 2.1).
    """
    nope, rope = spec.qk_nope_head_dim, spec.qk_rope_head_dim
    if spec.q_lora_rank:
        low = _normed(weights, "q_a_norm", source.own(weights, "q_a_proj", x))
        q = next(source.products(weights, ("q_b_proj",), low))
        del low
    else:
        q = next(source.products(weights, ("q_proj",), x))
    q = q.unflatten(-1, (-1, spec.head_dim))  # type: ignore[no-untyped-call]
    q_nope, q_rope = torch.split(q, [nope, rope], dim=-1)
    latent, k_rope = torch.split(source.own(weights, "kv_a_proj", x), [spec.kv_lora_rank, rope], dim=-1)
    both = next(source.products(weights, ("kv_b_proj",), _normed(weights, "kv_a_norm", latent)))
    both = both.unflatten(-1, (-1, nope + spec.v_head_dim))  # type: ignore[no-untyped-call]
    k_nope, v = torch.split(both, [nope, spec.v_head_dim], dim=-1)
    k_rope = rotated(source.whole(k_rope)[:, :, None], cos, sin, spec.rope_interleave)
    k_rope = k_rope.expand(-1, -1, q.shape[2], -1)
    q = torch.cat((q_nope, rotated(q_rope, cos, sin, spec.rope_interleave)), dim=-1)
    return q, torch.cat((k_nope, k_rope), dim=-1), v.contiguous()  # the view would keep keys alive too


def _product(weights: Weights, name: str, x: Tensor) -> Tensor:
    return product("", x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _normed(weights: Weights, name: str, x: Tensor) -> Tensor:
    return normed(x, weights[f"{name}.weight"], LATENT_EPS)
