"""The router: logits, the choice of experts, the weights of the chosen, and the gradients back to logits;
fused or composed, as the stack says.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.operators import kernels
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import OPS
from mopsim.spec.model import ModelSpec

Weights = dict[str, Tensor]


def router_scores(logits: Tensor, spec: ModelSpec) -> Tensor:
    """Scores [N, E] of logits [N, E]."""
    return logits.softmax(-1) if spec.scoring_func == "softmax" else logits.sigmoid()


def choose_experts(scores: Tensor, balance_bias: Tensor, spec: ModelSpec) -> Tensor:
    """Experts [N, top_k] (int64): the best of scores + bias, in the best groups where the model has some; the
    bias steers the choice and never the weight.
    """
    wanted = scores + balance_bias.to(scores.dtype)
    if spec.topk_group < spec.n_group:
        groups = wanted.view(wanted.shape[0], spec.n_group, -1)
        best = groups.topk(2 if spec.topk_method == "noaux_tc" else 1, dim=-1).values.sum(-1)
        out = torch.ones_like(best, dtype=torch.bool)
        out.scatter_(1, best.topk(spec.topk_group, dim=-1).indices, False)
        wanted = groups.masked_fill(out[..., None], float("-inf")).view_as(wanted)
    return torch.topk(wanted, spec.num_experts_per_tok, dim=-1).indices


def route_weights(scores: Tensor, experts: Tensor, spec: ModelSpec) -> Tensor:
    """Weights [N, top_k] of the chosen experts."""
    chosen = scores.gather(1, experts)
    if spec.norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * spec.routed_scaling_factor


def route_weights_backward(grad: Tensor, scores: Tensor, experts: Tensor, spec: ModelSpec) -> Tensor:
    """Gradient of the logits [N, E] from that of the weights [N, top_k]."""
    grad = grad * spec.routed_scaling_factor
    if spec.norm_topk_prob:
        chosen = scores.gather(1, experts)
        total = chosen.sum(-1, keepdim=True) + 1e-20
        grad = (grad - (grad * chosen).sum(-1, keepdim=True) / total) / total
    return scores_backward(torch.zeros_like(scores).scatter_add_(1, experts, grad), scores, spec)


def scores_backward(grad_scores: Tensor, scores: Tensor, spec: ModelSpec) -> Tensor:
    """Gradient of the logits [N, E] in the place of that of their scores."""
    if spec.scoring_func == "softmax":
        grad_scores.sub_((grad_scores * scores).sum(-1, keepdim=True))
        return grad_scores.mul_(scores)
    return grad_scores.mul_(scores).mul_(1 - scores)


def count_routes(load: Tensor, experts: Tensor) -> None:
    """load [E] += routes to each expert, in place."""
    flat = experts.reshape(-1)
    load.index_add_(0, flat, torch.ones_like(flat, dtype=load.dtype))


def _how(spec: ModelSpec) -> tuple[bool, bool, float]:
    """What fused route weights ask of a network."""
    return spec.scoring_func == "softmax", spec.norm_topk_prob, spec.routed_scaling_factor


def router_logits(hidden: Tensor, weights: Weights) -> Tensor:
    """Router logits [n, E] in the wide dtype."""
    if kernels.NOW.router:
        logits: Tensor = OPS.router_logits(
            hidden, weights["moe.router.weight"], weights.get("moe.router.bias")
        )
        return logits
    accurate = wide(hidden.dtype)
    bias = weights.get("moe.router.bias")
    bias = None if bias is None else bias.to(accurate)
    return F.linear(hidden.to(accurate), weights["moe.router.weight"].to(accurate), bias)


def weights_of_logits(logits: Tensor, experts: Tensor, spec: ModelSpec) -> Tensor:
    """Weights [n, top_k] of chosen experts from router logits [n, E]."""
    if kernels.NOW.router:
        found: Tensor = OPS.route_weights(logits, experts, *_how(spec))
        return found
    return route_weights(router_scores(logits, spec), experts.long(), spec)


def logits_backward(grad: Tensor, logits: Tensor, experts: Tensor, spec: ModelSpec) -> Tensor:
    """Gradient of router logits [n, E] from that of their route weights [n, top_k]."""
    if kernels.NOW.router:
        found: Tensor = OPS.route_weights_backward(grad, logits, experts, *_how(spec))
        return found
    return route_weights_backward(grad, router_scores(logits, spec), experts.long(), spec)
