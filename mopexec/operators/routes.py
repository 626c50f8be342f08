"""Which routes exist: the router's choice for a layer, and how many routes go between every pair of ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.mesh import Group
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, component
from mopexec.operators import kernels
from mopexec.operators.dtypes import wide
from mopexec.operators.fused import OPS
from mopexec.operators.grouped import ends_of
from mopexec.operators.least_loaded import Counted, Moves, placed
from mopexec.operators.norms import LayerNorms
from mopexec.operators.router import (
    choose_experts,
    logits_backward,
    router_logits,
    router_scores,
    weights_of_logits,
)
from mopexec.operators.router_losses import RouterLosses
from mopexec.operators.rows import add_matmul, row_slices
from mopsim.spec.layout import FUSED_ROWS
from mopsim.spec.model import ModelSpec
from mopsim.spec.routing import RoutingProfile, routing_counts
from mopsim.spec.strategy import Experts

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Routes:
    """One layer's routes of one microbatch, kept from forward to backward.

    experts [N, top_k] int16. send[i][e]: routes of chunk i from here to expert e. receive[i][r][e]: routes of
    chunk i that rank r of the expert group sends to local expert e. arrived: `receive` on the device; ends
    [i][e]: where the rows of each expert end. moves: where least-loaded placement moves rows; e is a
    destination or a slot then.
    """

    experts: Tensor
    send: list[list[int]]
    receive: list[list[list[int]]]
    arrived: Tensor
    ends: Tensor
    moves: Moves | None = None

    @classmethod
    def of(cls, experts: Tensor, counted: Counted) -> "Routes":
        send, receive, arrived, moves = counted
        with category("activations"):
            return cls(experts, send, receive, arrived, ends_of(arrived), moves)

    def orders(self) -> tuple[Tensor, Tensor]:
        """Of all chunks, one after the other, each [N * top_k] in the chunk's own places: the routes (token,
        slot) in the order in which they are sent, and where each went.
        """
        chunks, per_chunk = len(self.send), len(self.send[0])
        order = OPS.route_cells(self.experts, chunks, per_chunk).argsort(stable=True)
        if self.moves is not None:
            order = self.moves.order(order)
        found: tuple[Tensor, Tensor] = OPS.chunk_orders(order, chunks, self.experts.shape[1])
        return found


def exchanged(counts: Tensor, group: Group) -> Tensor:
    """Counts of routes that arrive [chunks, ranks, E / ranks], of those that are sent [chunks, E]."""
    send = counts.view(counts.shape[0], group.size, -1).transpose(0, 1).contiguous()
    if group.size == 1:
        return send.transpose(0, 1).contiguous()
    receive = torch.empty_like(send)
    collectives.all_to_all_single(receive, send, group=group.handle)
    return receive.transpose(0, 1).contiguous()


class RoutePlanner:
    """Makes `Routes`: by the router, or by a profile, whose counts are known without asking anyone."""

    def __init__(
        self, spec: ModelSpec, group: Group, profile: Tensor | None, routing: RoutingProfile, num_chunks: int,
        platform: Platform, how: Experts, losses: RouterLosses,
    ) -> None:  # fmt: skip
        self.spec, self.group, self.routing, self.num_chunks = spec, group, routing, num_chunks
        self.local, self.norms = spec.num_local_experts // group.size, LayerNorms.of(spec)
        self.profile, self.platform, self.how, self.losses = profile, platform, how, losses
        self.places = how.balance == "least_loaded" and group.size > 1
        self._stated: Routes | None = None

    def plan(self, x: Tensor, weights: Weights, balance_bias: Tensor, load: Tensor) -> tuple[Routes, Tensor]:
        """Routes of tokens x [N, H] (before the norm), and their weights as `weights`. load [E] float32 +=
        routes where the router chose.
        """
        if self.profile is not None:
            if self._stated is None:
                self._stated = Routes.of(self.profile, self._stated_counts(x.shape[0]))
            return self._stated, self.weights(x, self.profile, weights)
        experts = torch.empty((x.shape[0], self.spec.num_experts_per_tok), dtype=torch.int16, device=x.device)
        found = self.weights(x, experts, weights, balance_bias)
        with component("router"):
            return Routes.of(experts, self._exchanged_counts(experts, load)), found

    def weights(
        self, x: Tensor, experts: Tensor, weights: Weights, choose_by: Tensor | None = None
    ) -> Tensor:
        """Route weights [N, top_k], in the wide dtype, of tokens x [N, H] (before the norm). choose_by [E]:
        experts [N, top_k] are chosen first, with this bias.
        """
        with component("router"):
            found: list[Tensor] = []
            for start, stop in row_slices(x.shape[0], 0 if kernels.NOW.router else None):
                hidden = self.norms.forward(x[start:stop], weights, "ffn_norm")
                logits, chosen = router_logits(hidden, weights), experts[start:stop]
                del hidden
                if choose_by is not None:
                    scores = router_scores(logits, self.spec)
                    chosen.copy_(choose_experts(scores, choose_by, self.spec))
                    del scores
                with category("dispatch"):
                    found.append(weights_of_logits(logits, chosen, self.spec))
                del logits
            with category("dispatch"):
                return found[0] if len(found) == 1 else torch.cat(found)

    def backward_(
        self, grad: Tensor, grad_weights: Tensor, x: Tensor, experts: Tensor, weights: Weights, grads: Weights
    ) -> None:
        """grad [N, H] of tokens x += what the gradients of their route weights [N, top_k] and the router's
        losses give; grads += the router's and the norm's.
        """
        with component("router"):
            router = weights["moe.router.weight"].to(wide(x.dtype))
            shares = self.losses.shares(experts, router.t())
            for start, stop in row_slices(x.shape[0], FUSED_ROWS if kernels.NOW.router else None):
                rows = slice(start, stop)
                hidden = self.norms.forward(x[rows], weights, "ffn_norm")
                logits = router_logits(hidden, weights)
                grad_logits = logits_backward(grad_weights[rows], logits, experts[rows], self.spec)
                self.losses.add_gradient_(grad_logits, logits, shares, start)
                del logits
                add_matmul(grads["moe.router.weight"], grad_logits.t(), hidden.to(router.dtype))
                del hidden
                if "moe.router.bias" in grads:
                    grads["moe.router.bias"].add_(grad_logits.sum(0))
                self.norms.backward_(grad[rows], x[rows], grad_logits @ router, weights, grads, "ffn_norm")

    def _stated_counts(self, num_tokens: int) -> Counted:
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
        found = placed([send] * group.size, group, self.how, self.platform) if self.places else None
        if found is not None:
            return found
        first = group.place * local
        receive = [[counts[first : first + local]] * group.size for counts in send]
        with category("activations"):
            return send, receive, self.platform.upload(receive, (self.num_chunks, group.size, local)), None

    def _exchanged_counts(self, experts: Tensor, load: Tensor) -> Counted:
        """Counts of all chunks at once: one all-to-all, or one all-gather where rows are placed by all
        counts, and one wait for the device in a layer.
        """
        chunks, num_experts, size = self.num_chunks, self.spec.num_local_experts, self.group.size
        with category("dispatch"):
            cells = OPS.route_cells(experts, chunks, num_experts)
            counts = torch.zeros(chunks * num_experts, dtype=torch.int64, device=experts.device)
            counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.int64))
            counts = counts.view(chunks, num_experts)
            load.add_(counts.sum(0))
            if self.places:
                return self._placed_counts(counts)
            arrived = exchanged(counts, self.group)
            sent, received = self.platform.fetch(torch.stack((counts.flatten(), arrived.flatten())))
        by_expert = [sent[i * num_experts : (i + 1) * num_experts] for i in range(chunks)]
        cells = [received[i : i + self.local] for i in range(0, len(received), self.local)]
        return by_expert, [cells[i * size : (i + 1) * size] for i in range(chunks)], arrived, None

    def _placed_counts(self, counts: Tensor) -> Counted:
        """Of counts [chunks, E] of this rank; without moves as the all-to-all gives them."""
        group, first = self.group, self.group.place * self.local
        every = torch.empty((group.size, *counts.shape), dtype=counts.dtype, device=counts.device)
        collectives.all_gather_single(every.flatten(0, 1), counts, group.handle)
        known: list[list[list[int]]] = self.platform.fetch(every)
        found = placed(known, group, self.how, self.platform)
        if found is not None:
            return found
        here = slice(first, first + self.local)
        receive = [[chunks[i][here] for chunks in known] for i in range(self.num_chunks)]
        return known[group.place], receive, every[:, :, here].transpose(0, 1).contiguous(), None
