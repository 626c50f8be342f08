"""The router: which experts a token goes to, with what weight; bias balancing; routing by a
stated profile.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.routing import EVEN, RoutingProfile, even_step, hot, thresholds, turn, warm, whole_strides


@dataclass(frozen=True)
class Routing:
    """Who chooses the experts: the router ("learned"), or a profile by the token's position on its rank.

    A profile counts positions on a rank that holds `micro_batch` sequences cut into `sequence` slices.
    `learned` is the only choice under which the number of routes depends on data.
    """

    profile: RoutingProfile = "learned"
    micro_batch: int = 1
    sequence: int = 1

    @classmethod
    def chosen(cls, plan: Plan, by: Literal["learned", "profile"]) -> "Routing":
        """That of a rank whose sequences are not cut: the router's, or the plan's profile."""
        return cls() if by == "learned" else cls(plan.training.routing, plan.strategy.micro_batch)

    @property
    def learned(self) -> bool:
        return self.profile == "learned"

    def experts(self, spec: ModelSpec, batch: int, seq: int, device: torch.device) -> Tensor:
        """Experts [batch * seq, top_k] (int64) of every token of whole sequences, as their ranks would
        choose.
        """
        part = seq // self.sequence
        table = profile_experts(
            self.profile, self.micro_batch * part, spec.num_local_experts, spec.num_experts_per_tok, device
        )
        row = torch.arange(batch, device=device)[:, None] % self.micro_batch
        local = row * part + torch.arange(seq, device=device)[None, :] % part
        return table[local.flatten()]


def profile_experts(
    routing: RoutingProfile, num_tokens: int, num_experts: int, top_k: int, device: torch.device
) -> Tensor:
    """The experts of mopsim.spec.routing, of every token of a rank: [num_tokens, top_k] int64."""
    slot = torch.arange(top_k, device=device)[None, :]
    if routing in EVEN:
        return (_first_choices(num_tokens, num_experts, device) + slot) % num_experts
    skew = hot(routing)
    if skew is None:
        ends = torch.tensor(thresholds(routing, num_experts, top_k), device=device)
        turns = torch.tensor([turn(i) for i in range(num_tokens)], device=device)
        return torch.searchsorted(ends, turns[:, None] + slot * 2**32, right=True).clamp(max=num_experts - 1)
    percent, count = skew
    chosen_hot = (slot % count).expand(num_tokens, top_k)
    if count >= num_experts:
        return chosen_hot.contiguous()
    first = min(warm(percent, num_tokens), num_tokens)
    chosen = chosen_hot.clone()
    cold = num_experts - count
    starts = _first_choices(whole_strides(num_tokens - first), cold, device)[: num_tokens - first]
    chosen[first:] = count + (starts + slot) % cold
    return chosen


def _first_choices(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """The first expert of mopsim.spec.routing, of every token: [num_tokens, 1] int64."""
    position = torch.arange(num_tokens, device=device)[:, None]
    return (
        position * even_step(num_tokens) % num_tokens * num_experts // num_tokens if num_tokens else position
    )


def largest_share(load: Tensor, degree: int) -> Tensor:
    """Of the routes `load` [..., E], the part of the rank of an expert-parallel group that got most, averaged
    over the layers whose router chose; float64 scalar, nan where none did.
    """
    per_rank = load.double().reshape(*load.shape[:-1], degree, -1).sum(-1)
    return torch.nanmean(per_rank.amax(-1) / per_rank.sum(-1))


def load_histogram(load: Tensor) -> Tensor:
    """How many experts of the layers `load` [..., E] got less than 1/8 of their layer's even load, from 1/8
    to 1/4, and so on by doubling, and 8 times and more: [8] float64, without a wait for the device.
    """
    even = load.double().mean(-1, keepdim=True)
    relative = load / even
    edges = torch.exp2(torch.arange(-3, 4, dtype=torch.float64, device=load.device))
    least = (relative.reshape(-1, 1) >= edges).sum(0, dtype=torch.float64)
    counted = relative.isnan().logical_not().sum(dtype=torch.float64)
    ends = torch.cat((counted[None], least, torch.zeros_like(counted)[None]))
    return ends[:-1] - ends[1:]


def balance_told(load: Tensor, degree: int) -> Tensor:
    """`largest_share` and `load_histogram` of the routes `load` [..., E]: [9] float64."""
    return torch.cat((largest_share(load, degree)[None], load_histogram(load)))


def balance_step(balance_bias: Tensor, load: Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): raise the bias of underused experts by `rate`, lower
    others.
    """
    balance_bias.add_(torch.sign(load.mean() - load).to(balance_bias.dtype), alpha=rate)
