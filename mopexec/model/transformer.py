"""The single-device MoE transformer in plain torch modules, the reference that every parallel run is held
against.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopexec.model.attention_core import causal_attention
from mopexec.model.rope import rope_tables, rotate
from mopexec.model.routing import (
    Routing,
    balance_step,
    choose_experts,
    count_routes,
    largest_share,
    route_weights,
    router_scores,
    wide,
)
from mopexec.model.support import check_model
from mopexec.model.swiglu import grouped_swiglu, swiglu
from mopsim.spec.model import ModelSpec

AttentionCore = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 in float64)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions. `core` may be replaced (sequence parallelism)."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        width, kv_width = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        self.q_proj = _linear(spec.hidden_size, width, dtype, device)
        self.k_proj = _linear(spec.hidden_size, kv_width, dtype, device)
        self.v_proj = _linear(spec.hidden_size, kv_width, dtype, device)
        self.o_proj = _linear(width, spec.hidden_size, dtype, device)
        if spec.qk_norm == "head":
            self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, dtype, device)
            self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, dtype, device)
        self.core: AttentionCore = causal_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, H] to [B, S, H]; cos and sin [S, head_dim / 2] of the tokens' positions."""
        batch, seq, _ = x.shape
        q = self.q_proj(x).view(batch, seq, self.spec.num_attention_heads, self.spec.head_dim)
        k = self.k_proj(x).view(batch, seq, self.spec.num_key_value_heads, self.spec.head_dim)
        v = self.v_proj(x).view(batch, seq, self.spec.num_key_value_heads, self.spec.head_dim)
        if self.spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        out = self.core(rotate(q, cos, sin), rotate(k, cos, sin), v)
        result: Tensor = self.o_proj(out.reshape(batch, seq, -1))
        return result


class FeedForward(nn.Module):
    """Dense SwiGLU, also the shared expert."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = _linear(hidden, inner, dtype, device)
        self.up_proj = _linear(hidden, inner, dtype, device)
        self.down_proj = _linear(inner, hidden, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Router(nn.Module):
    """Chooses top_k experts per token. `load` counts routes since the last `update_balance`."""

    balance_bias: Tensor

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(
            torch.empty(spec.num_local_experts, spec.hidden_size, dtype=dtype, device=device)
        )
        self.register_buffer(
            "balance_bias", torch.zeros(spec.num_local_experts, dtype=torch.float32, device=device)
        )
        self.load = torch.zeros(spec.num_local_experts, dtype=torch.float32, device=device)

    def forward(self, x: Tensor, experts: Tensor | None) -> tuple[Tensor, Tensor]:
        """(experts [N, top_k] int64, weights [N, top_k] in float32 or float64) of tokens x [N, H].

        experts: the choice, where a routing profile makes it instead of the router.
        """
        logits = F.linear(x.to(wide(x.dtype)), self.weight.to(wide(x.dtype)))
        scores = router_scores(logits, self.spec)
        if experts is None:
            with torch.no_grad():
                experts = choose_experts(scores, self.balance_bias, self.spec)
                count_routes(self.load, experts)
        return experts, route_weights(scores, experts, self.spec)


class Experts(nn.Module):
    """The routed experts, stacked: gate_proj and up_proj [E, H, I], down_proj [E, I, H]."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shape = (spec.num_local_experts, spec.hidden_size, spec.moe_intermediate_size)
        self.gate_proj = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.up_proj = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1], dtype=dtype, device=device))

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert [R, H] to [R, H]."""
        return grouped_swiglu(x, counts, self.gate_proj, self.up_proj, self.down_proj)


Dispatch = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def dispatch_locally(x: Tensor, experts: Tensor, weights: Tensor, module: Experts) -> Tensor:
    """Sum over a token's routes of weight times expert output: x [N, H], experts and weights [N, top_k] to
    [N, H].
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(module.gate_proj.shape[0], dtype=torch.float32, device=x.device)
    count_routes(counts, experts)
    token = order // experts.shape[1]
    out = module(x[token], [int(count) for count in counts.tolist()])
    routed = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    return routed.index_add(0, token, out * weights.flatten()[order, None]).to(x.dtype)


class MoE(nn.Module):
    """Router, routed experts and shared experts. `dispatch` may be replaced (expert parallelism)."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.router = Router(spec, dtype, device)
        self.experts = Experts(spec, dtype, device)
        self.shared: FeedForward | None = None
        if spec.shared_expert_intermediate_size:
            self.shared = FeedForward(spec.hidden_size, spec.shared_expert_intermediate_size, dtype, device)
        self.dispatch: Dispatch = dispatch_locally

    def forward(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """Tokens [N, H] to [N, H]; experts [N, top_k] where a profile chose them."""
        chosen, weights = self.router(x, experts)
        out = self.dispatch(x, chosen, weights, self.experts)
        return out if self.shared is None else out + self.shared(x)


class Layer(nn.Module):
    """Pre-norm decoder layer: attention, then a dense FFN or MoE."""

    def __init__(self, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, device)
        self.attention = Attention(spec, dtype, device)
        self.ffn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, device)
        self.is_moe = spec.is_moe_layer(index)
        if self.is_moe:
            self.moe = MoE(spec, dtype, device)
        else:
            self.ffn = FeedForward(spec.hidden_size, spec.intermediate_size, dtype, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, experts: Tensor | None = None) -> Tensor:
        """[B, S, H] to [B, S, H]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        hidden: Tensor = self.ffn_norm(x)
        if self.is_moe:
            inner: Tensor = self.moe(hidden.flatten(0, 1), experts).view_as(x)
        else:
            inner = self.ffn(hidden)
        return x + inner


class Transformer(nn.Module):
    """Decoder-only transformer of a ModelSpec. Parameter names and shapes are those of
    `mopsim.graph.parameters`.

    Raises SpecError for a spec that the executor does not run (`check_model`). Weights are uninitialised:
    `init_weights`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        routing: Routing = Routing(),  # noqa: B008
    ) -> None:
        check_model(spec)
        super().__init__()
        device = torch.device(device)
        self.spec, self.routing = spec, routing
        table = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=table)
        self.layers = nn.ModuleList(
            Layer(spec, index, dtype, device) for index in range(spec.num_hidden_layers)
        )
        self.final_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype, device)
        self.head = _linear(spec.hidden_size, spec.vocab_size, dtype, device)

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Normed hidden states [B, S, H] of tokens [B, S]; start: position of the first token (a sequence's
        slice).
        """
        batch, seq = tokens.shape
        x = self.embedding(tokens)
        cos, sin = rope_tables(
            start, start + seq, self.spec.head_dim, self.spec.rope_theta, x.dtype, x.device
        )
        experts = None
        if not self.routing.learned and self.spec.num_moe_layers:
            experts = self.routing.experts(self.spec, batch, seq, x.device)
        for layer in self.layers:
            x = layer(x, cos, sin, experts)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def loss(self, tokens: Tensor, targets: Tensor, start: int = 0) -> Tensor:
        """Sum over tokens of the cross entropy of targets [B, S], in float32 (float64 in float64)."""
        logits = self.head(self(tokens, start)).flatten(0, 1)
        return F.cross_entropy(logits.to(wide(logits.dtype)), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def update_balance(
        self, rate: float, reduce: Callable[[Tensor], object] = lambda load: None, degree: int = 1
    ) -> Tensor:
        """Move every router's balance bias by the load since the last call; returns `largest_share` of it,
        NaN where the model has no router.

        reduce: sums loads over ranks in place. degree: of expert parallelism.
        """
        busiest = []
        for layer in self.layers:
            if getattr(layer, "is_moe", False):
                router = layer.moe.router  # type: ignore[union-attr]
                assert isinstance(router, Router)
                reduce(router.load)
                busiest.append(largest_share(router.load, degree))
                balance_step(router.balance_bias, router.load, rate)
                router.load.zero_()
        return torch.stack(busiest).mean() if busiest else torch.tensor(math.nan)


class _Linear(nn.Linear):
    """A bias-free nn.Linear whose weight [outputs, inputs] is left as it is made: `init_weights` fills it."""

    def reset_parameters(self) -> None:
        """Nothing: torch.nn.utils.skip_init would not work on fake tensors."""


def _linear(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    return _Linear(inputs, outputs, bias=False, dtype=dtype, device=device)
