"""What one rank of a parity test does: train a flat_units runner and the single-device model side by side."""

import os
import time
from typing import Any

import torch
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.model import Routing, Transformer, init_weights
from mopexec.model.auxiliary import Auxiliary
from mopexec.model.moe import Router
from mopexec.operators import rows
from mopexec.run import apply
from mopexec.run.runner import Batch
from mopsim.spec import layout
from mopsim.spec.plan import Plan

STEPS = 2


def make_tokens(plan: Plan, step: int) -> Tensor:
    """The global batch of a step: [global_batch, seq_len + 1], the last column a target only."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (plan.training.global_batch, plan.training.seq_len + 1)
    return torch.randint(0, plan.model.vocab_size, shape, generator=generator)


def my_batches(plan: Plan, tokens: Tensor, rank: int, device: torch.device) -> list[Batch]:
    """This rank's microbatches out of a global batch: data group g takes its run of sequences."""
    strategy = plan.strategy
    place, part = layout.place(strategy, rank), plan.training.seq_len // strategy.attention.context_parallel
    found = []
    for index in range(plan.training.num_microbatches(strategy)):
        first = (index * strategy.data_groups + place.data) * strategy.micro_batch
        sequences = tokens[first : first + strategy.micro_batch]
        inputs, targets = sequences[:, :-1], sequences[:, 1:]
        window = slice(place.context * part, (place.context + 1) * part)
        found.append(
            Batch(inputs[:, window].contiguous().to(device), targets[:, window].contiguous().to(device))
        )
    return found


class Reference:
    """The single-device model with torch's own clipping and AdamW."""

    def __init__(self, plan: Plan, routing: str, device: torch.device) -> None:
        self.plan = plan
        strategy = plan.strategy
        slices = strategy.attention.context_parallel * strategy.dense.tensor_parallel
        profile = Routing(plan.training.routing, strategy.micro_batch, slices)
        choice = Routing() if routing == "learned" else profile
        self.model = Transformer(plan.model, getattr(torch, strategy.precision.compute), device, choice)
        init_weights(self.model, 7)
        training = plan.training
        weights = (training.router_aux_loss_coef, training.router_z_loss_coef, training.mtp_loss_coef)
        self.model.set_auxiliary(Auxiliary(*weights))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.learning_rate, betas=(training.beta1, training.beta2),
            eps=training.eps, weight_decay=training.weight_decay,
        )  # fmt: skip
        self.gradients: dict[str, Tensor] = {}

    def step(self, tokens: Tensor) -> tuple[float, float]:
        """(mean loss, gradient norm before clipping); keeps the unclipped gradients."""
        training = self.plan.training
        count = training.global_batch * training.seq_len
        self.optimizer.zero_grad()
        loss = self.model.loss(tokens[:, :-1], tokens[:, 1:].contiguous(), scale=1 / count)
        loss.backward()
        self.gradients = {
            name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
        }
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        self.optimizer.step()
        if self.model.routing.learned and self.plan.model.num_moe_layers:
            self.model.update_balance(training.bias_update_rate)
        return loss.item(), norm.item()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> float:
        """The mean loss as the model is now, its routers' counts as they were."""
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        loads = [router.load.clone() for router in routers]
        loss = self.model.loss(tokens[:, :-1], tokens[:, 1:].contiguous()) / tokens[:, 1:].numel()
        for router, load in zip(routers, loads, strict=True):
            router.load.copy_(load)
        return loss.item()


def compare(platform: Platform, plan: Plan, routing: Any, steps: int = STEPS) -> dict[str, float]:
    """Largest relative differences over some steps: of loss, gradient norm, each gradient and each weight."""
    rank = int(os.environ["RANK"])
    runner = apply.build(plan, platform, routing=routing, seed=7)
    reference = Reference(plan, routing, platform.device)
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0}
    for step in range(steps):
        tokens = make_tokens(plan, step)
        result = runner.step(my_batches(plan, tokens, rank, platform.device))
        loss, norm = reference.step(tokens.to(platform.device))
        assert norm > 2 * plan.training.clip_norm, f"clipping is not active at norm {norm}"
        worst["loss"] = max(worst["loss"], abs(result.loss - loss) / abs(loss))
        worst["norm"] = max(worst["norm"], abs(result.grad_norm - norm) / norm)
        gradients, weights = runner.full_gradients(), runner.full_parameters()
        for kind, found in differences(gradients, weights, reference, norm).items():
            worst[kind] = max(worst[kind], found)
    return worst


class Throttled(Platform):
    """Copies between the tiers take longer than a whole step, so that what should wait for one and does not
    reads what is not there yet."""

    SECONDS = 0.004

    def copy(self, dst: Tensor, src: Tensor, stream: str | None = None) -> None:
        """See `Platform.copy`."""
        time.sleep(self.SECONDS if stream else 0.0)
        super().copy(dst, src, stream)


def train(platform: Platform, plan: Plan) -> tuple[list[float], dict[str, Tensor]]:
    """(losses of STEPS steps and of an evaluation after each, weights and state) with slow copies."""
    runner = apply.build(plan, Throttled(platform.device), seed=7)
    losses = []
    for step in range(STEPS):
        batches = my_batches(plan, make_tokens(plan, step), int(os.environ["RANK"]), platform.device)
        losses += [runner.step(batches).loss, runner.evaluate(batches)]
    state = runner.state_dict()
    kept = {f"{name} {at}": part for name in state for at, part in getattr(state[name], "pieces", {}).items()}
    return losses, runner.full_parameters() | kept


def compare_in_slices(platform: Platform, plan: Plan, routing: Any, num_rows: int) -> dict[str, float]:
    """`compare` with element-wise work cut into slices of `num_rows` rows."""
    whole, rows.SLICE_ROWS = rows.SLICE_ROWS, num_rows
    try:
        return compare(platform, plan, routing)
    finally:
        rows.SLICE_ROWS = whole


def differences(
    gradients: dict[str, Tensor], weights: dict[str, Tensor], reference: Reference, norm: float
) -> dict[str, float]:
    """The largest relative differences of any gradient and any weight from the single-device model's."""
    expected = dict(reference.model.named_parameters())
    assert set(gradients) == set(weights) == set(expected)
    worst = {"gradients": 0.0, "weights": 0.0}
    for name, weight in expected.items():
        gradient = reference.gradients.get(name, torch.zeros_like(weight))
        worst["gradients"] = max(worst["gradients"], relative(gradients[name], gradient, 1e-6 * norm))
        worst["weights"] = max(worst["weights"], relative(weights[name], weight.detach(), 0.0))
    return worst


def relative(actual: Tensor, expected: Tensor, floor: float) -> float:
    """Largest difference over the largest value of `expected`, or over `floor` where all values
    are smaller.
    """
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    scale = max(expected.abs().max().item(), floor)
    return (actual.to(expected.device, expected.dtype) - expected).abs().max().item() / scale
