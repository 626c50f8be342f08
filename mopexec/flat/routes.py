"""Which routes exist: the router's choice for a layer, and how many routes go between every pair of ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.flat.rows import SLICE_ROWS, rms_norm, row_slices
from mopexec.measure.tracker import category, component
from mopexec.model import kernels
from mopexec.model.fused import OPS
from mopexec.model.routing import choose_experts, route_weights, route_weights_backward, router_scores, wide
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile, routing_counts

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Routes:
    """One layer's routes of one microbatch, kept from forward to backward.

    experts [N, top_k] int16. send[i][e]: routes of chunk i from here to expert e. receive[i][r][e]: routes of
    chunk i that rank r of the expert group sends to local expert e. arrived: `receive` on the device.
    """

    experts: Tensor
    send: list[list[int]]
    receive: list[list[list[int]]]
    arrived: Tensor


class RoutePlanner:
    """Makes `Routes`: by the router, or by a profile, whose counts are known without asking anyone."""

    def __init__(
        self, spec: ModelSpec, group: Group, profile: Tensor | None, routing: RoutingProfile, num_chunks: int,
        platform: Platform,
    ) -> None:  # fmt: skip
        self.spec, self.group, self.routing, self.num_chunks = spec, group, routing, num_chunks
        self.local = spec.num_local_experts // group.size
        self.profile, self.platform = profile, platform
        self._stated: Routes | None = None

    def plan(self, x: Tensor, weights: Weights, balance_bias: Tensor, load: Tensor) -> Routes:
        """Routes of tokens x [N, H] (before the norm). load [E] float32 += routes where the router chose."""
        if self.profile is not None:
            if self._stated is None:
                send, receive = self._stated_counts(x.shape[0])
                shape = (self.num_chunks, self.group.size, self.local)
                with category("activations"):
                    arrived = torch.empty(shape, dtype=torch.int64, device=x.device)
                with self.platform.bookkeeping():
                    host = torch.tensor(receive)
                arrived.copy_(host)
                self._stated = Routes(self.profile, send, receive, arrived)
            return self._stated
        experts = torch.empty((x.shape[0], self.spec.num_experts_per_tok), dtype=torch.int16, device=x.device)
        with component("router"):
            for start, stop in row_slices(x.shape[0], 0 if kernels.NOW.router else SLICE_ROWS):
                hidden = rms_norm(x[start:stop], weights["ffn_norm.weight"], self.spec.rms_norm_eps)
                scores = router_scores(_logits(hidden, weights), self.spec)
                experts[start:stop].copy_(choose_experts(scores, balance_bias, self.spec))
                del hidden, scores
            return Routes(experts, *self._exchanged_counts(experts, load))

    def weights(self, hidden: Tensor, experts: Tensor, weights: Weights) -> Tensor:
        """Route weights [n, top_k], in the wide dtype, of normed tokens hidden [n, H]."""
        if kernels.NOW.router:
            logits = _logits(hidden, weights)
            found: Tensor = OPS.route_weights(logits, experts, *_how(self.spec))
            return found
        scores = router_scores(_logits(hidden, weights), self.spec)
        return route_weights(scores, experts.long(), self.spec)

    def _stated_counts(self, num_tokens: int) -> tuple[list[list[int]], list[list[list[int]]]]:
        spec, group, local = self.spec, self.group, self.local
        send = [
            list(
                routing_counts(
                    self.routing,
                    num_tokens,
                    self.num_chunks,
                    i,
                    spec.num_local_experts,
                    spec.num_experts_per_tok,
                )
            )
            for i in range(self.num_chunks)
        ]
        first = group.place * local
        return send, [[counts[first : first + local]] * group.size for counts in send]

    def _exchanged_counts(
        self, experts: Tensor, load: Tensor
    ) -> tuple[list[list[int]], list[list[list[int]]], Tensor]:
        """Counts of all chunks at once: one all-to-all and one wait for the device in a layer."""
        chunks, num_experts, size = self.num_chunks, self.spec.num_local_experts, self.group.size
        with category("dispatch"):
            chunk = torch.arange(experts.shape[0], device=experts.device) % chunks
            cell = (experts.long() + (chunk * num_experts)[:, None]).flatten()
            counts = torch.zeros(chunks * num_experts, dtype=torch.int64, device=experts.device)
            counts.index_add_(0, cell, torch.ones_like(cell))
            counts = counts.view(chunks, num_experts)
            load.add_(counts.sum(0))
            send = counts.view(chunks, size, self.local).transpose(0, 1).contiguous()
            receive = torch.empty_like(send) if size > 1 else send
            if size > 1:
                collectives.all_to_all_single(receive, send, group=self.group.handle)
            arrived = receive.transpose(0, 1).contiguous()
            sent, received = self.platform.fetch(torch.stack((counts.flatten(), arrived.flatten())))
        by_expert = [sent[i * num_experts : (i + 1) * num_experts] for i in range(chunks)]
        cells = [received[i : i + self.local] for i in range(0, len(received), self.local)]
        return by_expert, [cells[i * size : (i + 1) * size] for i in range(chunks)], arrived


def _how(spec: ModelSpec) -> tuple[bool, bool, float]:
    """What fused route weights ask of a network."""
    return spec.scoring_func == "softmax", spec.norm_topk_prob, spec.routed_scaling_factor


def _logits(hidden: Tensor, weights: Weights) -> Tensor:
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


def router_backward(
    grad: Tensor, hidden: Tensor, experts: Tensor, weights: Weights, grads: Weights, spec: ModelSpec
) -> Tensor:
    """Gradient [n, H] of normed tokens from that of their route weights [n, top_k]; grads += the router's."""
    accurate = wide(hidden.dtype)
    if kernels.NOW.router:
        logits = _logits(hidden, weights)
        grad_logits = OPS.route_weights_backward(grad, logits, experts, *_how(spec))
        del logits
    else:
        scores = router_scores(_logits(hidden, weights), spec)
        grad_logits = route_weights_backward(grad, scores, experts.long(), spec)
        del scores
    grads["moe.router.weight"].add_(grad_logits.t() @ hidden.to(accurate))
    if "moe.router.bias" in grads:
        grads["moe.router.bias"].add_(grad_logits.sum(0))
    found: Tensor = (grad_logits @ weights["moe.router.weight"].to(accurate)).to(hidden.dtype)
    return found
