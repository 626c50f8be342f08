"""The MoE block: router, routed experts, shared experts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mopexec.model.auxiliary import Auxiliary, attach, router_loss
from mopexec.model.kept import product
from mopexec.model.parts import FeedForward, linear
from mopexec.model.swiglu import grouped_experts
from mopexec.operators.activation import activation_of, wings_of
from mopexec.operators.dtypes import wide
from mopexec.operators.grouped import RowCounts
from mopexec.operators.router import choose_experts, count_routes, route_weights, router_scores
from mopsim.spec.model import ModelSpec


class Router(nn.Module):
    """Chooses top_k experts per token. `load` counts routes since the last `update_balance`."""

    balance_bias: Tensor

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.auxiliary = spec, Auxiliary()
        experts = spec.num_local_experts
        self.weight = nn.Parameter(torch.empty(experts, spec.hidden_size, dtype=dtype, device=device))
        self.bias: nn.Parameter | None = None
        if spec.router_bias:
            self.bias = nn.Parameter(torch.empty(experts, dtype=dtype, device=device))
        self.register_buffer("balance_bias", torch.zeros(experts, dtype=torch.float32, device=device))
        self.load = torch.zeros(experts, dtype=torch.float32, device=device)

    def forward(self, x: Tensor, experts: Tensor | None, batch: int = 1) -> tuple[Tensor, Tensor]:
        """(experts [N, top_k] int64, weights [N, top_k] in float32 or float64) of tokens x [N, H].

        experts: the choice, where a routing profile makes it instead of the router. batch: sequences that the
        tokens are of.
        """
        return self.judged(*self.scored(x, experts), batch)

    def scored(self, x: Tensor, experts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(experts, weights) before any loss of the router's; logits and scores [N, E]."""
        accurate = wide(x.dtype)
        bias = None if self.bias is None else self.bias.to(accurate)
        logits = product("", x.to(accurate), self.weight.to(accurate), bias)
        scores = router_scores(logits, self.spec)
        if experts is None:
            with torch.no_grad():
                experts = choose_experts(scores, self.balance_bias, self.spec)
                count_routes(self.load, experts)
        return experts, route_weights(scores, experts, self.spec), logits, scores

    def judged(
        self, experts: Tensor, weights: Tensor, logits: Tensor, scores: Tensor, batch: int
    ) -> tuple[Tensor, Tensor]:
        """(experts, weights) with the router's losses in the gradient of the weights."""
        if self.has_losses:
            weights = attach(weights, router_loss(logits, scores, experts, batch, self.auxiliary))
        return experts, weights

    @property
    def has_losses(self) -> bool:
        """Whether losses of the router join the objective."""
        return bool(self.auxiliary.balance or self.auxiliary.z)


class RoutedExperts(nn.Module):
    """The routed experts, stacked: gate_proj, where they have one, and up_proj [E, H, I], down_proj [E, I,
    H], biases [E, .]."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        count, hidden, inner = spec.num_local_experts, spec.hidden_size, spec.moe_intermediate_size
        self.how, self.inputs_weighted = activation_of(spec), spec.expert_inputs_weighted
        wings = wings_of(self.how)
        for name, shape in (*((name, (hidden, inner)) for name in wings), ("down", (inner, hidden))):
            stack = torch.empty((count, *shape), dtype=dtype, device=device)
            self.register_parameter(f"{name}_proj", nn.Parameter(stack))
            if spec.expert_bias:
                bias = torch.empty((count, shape[1]), dtype=dtype, device=device)
                self.register_parameter(f"{name}_proj_bias", nn.Parameter(bias))

    def forward(self, x: Tensor, counts: RowCounts) -> Tensor:
        """Rows sorted by expert [R, H] to [R, H]."""
        return grouped_experts(x, counts, dict(self.named_parameters()), self.how)


Dispatch = Callable[[Tensor, Tensor, Tensor, RoutedExperts], Tensor]


def dispatch_locally(x: Tensor, experts: Tensor, weights: Tensor, module: RoutedExperts) -> Tensor:
    """Sum over a token's routes of weight times expert output, or of the output of weight times input:
    x [N, H], experts and weights [N, top_k] to [N, H].
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    stack = module.get_parameter("up_proj")
    counts = torch.zeros((1, stack.shape[0]), dtype=torch.int64, device=x.device)
    count_routes(counts[0], experts)
    token = order // experts.shape[1]
    rows, share = x[token], weights.flatten()[order, None]
    if module.inputs_weighted:
        rows, share = (rows * share).to(x.dtype), torch.ones_like(share)
    out = module(rows, RowCounts(counts.tolist(), counts))
    routed = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    return routed.index_add(0, token, out * share).to(x.dtype)


@contextmanager
def kept_loads(network: nn.Module) -> Iterator[None]:
    """The loads of a network's routers are afterwards what they were, whatever was run."""
    routers = [module for module in network.modules() if isinstance(module, Router)]
    loads = [router.load.clone() for router in routers]
    yield
    for router, load in zip(routers, loads, strict=True):
        router.load.copy_(load)


class MoE(nn.Module):
    """Router, routed experts and shared experts. `dispatch` may be replaced (expert parallelism)."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.router = Router(spec, dtype, device)
        self.experts = RoutedExperts(spec, dtype, device)
        self.shared: FeedForward | None = None
        self.shared_gate: nn.Linear | None = None
        if spec.shared_expert_intermediate_size:
            self.shared = FeedForward(spec, spec.shared_expert_intermediate_size, dtype, device)
        if spec.shared_expert_gate:
            self.shared_gate = linear(spec.hidden_size, 1, dtype, device)
        self.dispatch: Dispatch = dispatch_locally

    def forward(self, x: Tensor, experts: Tensor | None, batch: int = 1) -> Tensor:
        """Tokens [N, H] of `batch` sequences to [N, H]; experts [N, top_k] where a profile chose them."""
        chosen, weights = self.router(x, experts, batch)
        out = self.dispatch(x, chosen, weights, self.experts)
        if self.shared is None:
            return out
        shared: Tensor = self.shared(x)
        if self.shared_gate is not None:
            shared = self.shared_gate(x).sigmoid() * shared
        return out + shared
