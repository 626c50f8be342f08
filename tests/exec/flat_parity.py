"""What one rank of a parity test does: train a flat_units runner and the single-device model side by side."""

import math
import os
import time
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.flat.flat_units import FlatRunner
from mopexec.model import Routing, Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.model.moe import Router
from mopexec.operators import rows
from mopexec.run import apply
from mopexec.run.runner import Batch, Runner
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim.common import io
from mopsim.spec import layout
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.training import TrainSpec

STEPS, BIAS = 2, "balance_bias"


def decay_groups(model: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
    """For torch.optim.AdamW: matrices decay, vectors and experts' biases do not."""
    named = {name: p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("bias")}
    rest = [p for name, p in model.named_parameters() if name not in named]
    return [{"params": list(named.values()), "weight_decay": rate}, {"params": rest, "weight_decay": 0.0}]


def make_tokens(plan: Plan, step: int) -> Tensor:
    """The global batch of a step: [global_batch, seq_len + 1], the last column a target only."""
    return tokens_of(plan.model, plan.training, step)


def tokens_of(model: ModelSpec, training: TrainSpec, step: int) -> Tensor:
    """See `make_tokens`."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (training.global_batch, training.seq_len + 1)
    return torch.randint(0, model.vocab_size, shape, generator=generator)


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


class Step(NamedTuple):
    """What the single-device model has after a step: the mean loss and the gradient norm before clipping, the
    unclipped gradients, the updated weights, the mean loss that an evaluation then finds, and what balances
    experts."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    evaluation: float
    biases: dict[str, Tensor]


def reference(plan: Plan, routing: str, device: torch.device, steps: int) -> tuple[Step, ...]:
    """The single-device model, on the tokens of `make_tokens`. routing: "learned", else the plan's."""
    strategy = plan.strategy
    slices = strategy.attention.context_parallel * strategy.dense.tensor_parallel
    profile = Routing(plan.training.routing, strategy.micro_batch, slices)
    choice = Routing() if routing == "learned" else profile
    return _trained(plan.model, plan.training, strategy.precision.compute, choice, device, steps)


@cache
def _trained(
    spec: ModelSpec, training: TrainSpec, dtype: str, choice: Routing, device: torch.device, steps: int
) -> tuple[Step, ...]:
    """Under torch's own clipping and AdamW. Many cases have the same."""
    model = Transformer(spec, getattr(torch, dtype), device, choice)
    fill(model, Seeded(7))
    model.set_auxiliary(Auxiliary.of(training))
    optimizer = torch.optim.AdamW(
        decay_groups(model, training.weight_decay), lr=training.learning_rate,
        betas=(training.beta1, training.beta2), eps=training.eps,
    )  # fmt: skip
    found = []
    for step in range(steps):
        tokens = tokens_of(spec, training, step).to(device)
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous(), scale=1 / tokens[:, 1:].numel())
        loss.backward()
        named = dict(model.named_parameters())
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        most = training.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most).item()
        assert norm > 2 * training.clip_norm, f"clipping is not active at norm {norm}"
        optimizer.step()
        if choice.learned and spec.num_moe_layers:
            model.update_balance(training.bias_update_rate)
        after = {name: p.detach().clone() for name, p in named.items()}
        biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(BIAS)}
        found.append(Step(loss.item(), norm, gradients, after, _evaluated(model, tokens), biases))
    return tuple(found)


@torch.no_grad()
def _evaluated(model: Transformer, tokens: Tensor) -> float:
    """The mean loss as the model is now, its routers' counts as they were."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = [router.load.clone() for router in routers]
    loss = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous()) / tokens[:, 1:].numel()
    for router, load in zip(routers, loads, strict=True):
        router.load.copy_(load)
    return loss.item()


def compare(platform: Platform, plan: Plan, routing: Any) -> dict[str, float]:
    """Largest relative differences over STEPS steps: of loss, gradient norm, each gradient and each weight;
    and how far the biases that balance experts are off after the last."""
    rank = int(os.environ["RANK"])
    runner = apply.build(plan, platform, routing=routing, seed=7)
    runner.keep_gradients()
    worst = {"loss": 0.0, "norm": 0.0, "gradients": 0.0, "weights": 0.0}
    for step, expected in enumerate(reference(plan, routing, platform.device, STEPS)):
        result = runner.step(my_batches(plan, make_tokens(plan, step), rank, platform.device))
        worst["loss"] = max(worst["loss"], abs(result.loss - expected.loss) / abs(expected.loss))
        worst["norm"] = max(worst["norm"], abs(result.grad_norm - expected.norm) / expected.norm)
        gradients, weights = runner.full_gradients(), runner.full_parameters()
        for kind, found in differences(gradients, weights, expected).items():
            worst[kind] = max(worst[kind], found)
    state = runner.state_dict()
    apart = [(state[name] - bias).abs().max().item() for name, bias in expected.biases.items()]
    return worst | {"balance": max(apart, default=0.0)}


def evaluated(platform: Platform, plan: Plan) -> dict[str, float]:
    """As `compare`, with an evaluation on the step's own batches after each step."""
    rank, worst = int(os.environ["RANK"]), {"loss": 0.0, "norm": 0.0, "evaluation": 0.0}
    runner = apply.build(plan, platform, seed=7)
    for step, expected in enumerate(reference(plan, "learned", platform.device, STEPS)):
        batches = my_batches(plan, make_tokens(plan, step), rank, platform.device)
        result, later = runner.step(batches), runner.evaluate(batches)
        told = {"loss": result.loss, "norm": result.grad_norm, "evaluation": later}
        wanted = {"loss": expected.loss, "norm": expected.norm, "evaluation": expected.evaluation}
        for kind, found in told.items():
            worst[kind] = max(worst[kind], abs(found - wanted[kind]) / abs(wanted[kind]))
    return worst


class Throttled(Platform):
    """Copies between the tiers take longer than a whole step, so that what should wait for one and does not
    reads what is not there yet."""

    SECONDS = 0.004

    def copy(self, dst: Tensor, src: Tensor, stream: str | None = None) -> None:
        """See `Platform.copy`."""
        time.sleep(self.SECONDS if stream else 0.0)
        super().copy(dst, src, stream)


def train(platform: Platform, plan: Plan, routing: Any = "learned") -> tuple[list[float], dict[str, Tensor]]:
    """(losses and gradient norms of STEPS steps and of an evaluation after the first, weights and state) with
    slow copies."""
    runner = apply.build(plan, Throttled(platform.device), routing=routing, seed=7)
    losses = []
    for step in range(STEPS):
        batches = my_batches(plan, make_tokens(plan, step), int(os.environ["RANK"]), platform.device)
        result = runner.step(batches)
        losses += [result.loss, result.grad_norm] + ([] if step else [runner.evaluate(batches)])
    return losses, _state(runner)


def _state(runner: Runner) -> dict[str, Tensor]:
    """Weights, and what a checkpoint would have."""
    state = runner.state_dict()
    kept = {f"{name} {at}": part for name in state for at, part in getattr(state[name], "pieces", {}).items()}
    return runner.full_parameters() | kept


def diverge(platform: Platform, plan: Plan) -> tuple[list[float], dict[str, Tensor]]:
    """(loss and gradient norm, weights and state) of a step after one that left a weight of one rank that is
    no number."""
    runner = apply.build(plan, Throttled(platform.device), seed=7)
    assert isinstance(runner, FlatRunner)
    rank, found = int(os.environ["RANK"]), []
    for step in range(STEPS):
        result = runner.step(my_batches(plan, make_tokens(plan, step), rank, platform.device))
        found = [result.loss, result.grad_norm]
        runner.optimizer.finish()
        if step == 0 and rank == 1:
            runner.model.layers[1].dense.params[0] = math.nan
    return found, _state(runner)


_RUNS: dict[str, tuple[list[float], dict[str, Tensor]]] = {}


def apart(
    platform: Platform, plain: Plan, plan: Plan, work: str, *given: Any
) -> tuple[list[float], list[str]]:
    """(losses and norms of the plan's run by `work`, `train` or `diverge`; what of it is not to the bit that
    of the plain plan's, which runs once in this process). What is no number in both is the same."""
    run = {"train": train, "diverge": diverge}[work]
    key = f"{io.digest(plain)} {work} {given}"
    if key not in _RUNS:
        _RUNS[key] = run(platform, plain, *given)
    losses, state = _RUNS[key]
    found, own = run(platform, plan, *given)
    pairs = zip(found, losses, strict=True)
    lost = [
        f"number {at}" for at, (a, b) in enumerate(pairs) if a != b and not (math.isnan(a) and math.isnan(b))
    ]
    names = state.keys() & own.keys()
    return found, lost + sorted(state.keys() ^ own.keys()) + [
        one for one in names if not _same(state[one], own[one])
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    numbers = torch.equal(one.nan_to_num(), other.nan_to_num())
    return numbers and torch.equal(one.isnan(), other.isnan())


def fail(platform: Platform, plan: Plan) -> str:
    """What ends a step whose update fails in the middle."""
    runner = apply.build(plan, Throttled(platform.device), seed=7)
    assert isinstance(runner, FlatRunner)
    update, updated = runner.optimizer._adamw, []

    def failing(*given: Any) -> None:
        updated.append(given)
        if len(updated) > 2:
            raise ValueError("the device is gone")
        update(*given)

    runner.optimizer._adamw = failing  # type: ignore[method-assign]
    try:
        runner.step(my_batches(plan, make_tokens(plan, 0), int(os.environ["RANK"]), platform.device))
    except ValueError as error:
        return str(error)
    return ""


def compare_in_slices(platform: Platform, plan: Plan, routing: Any, num_rows: int) -> dict[str, float]:
    """`compare` with element-wise work cut into slices of `num_rows` rows."""
    whole, rows.SLICE_ROWS = rows.SLICE_ROWS, num_rows
    assert len(rows.row_slices(2 * num_rows)) == 2
    try:
        return compare(platform, plan, routing)
    finally:
        rows.SLICE_ROWS = whole


def differences(gradients: dict[str, Tensor], weights: dict[str, Tensor], expected: Step) -> dict[str, float]:
    """The largest relative differences of any gradient and any weight from the single-device model's."""
    assert set(gradients) == set(weights) == set(expected.weights)
    worst = {"gradients": 0.0, "weights": 0.0}
    for name, weight in expected.weights.items():
        gradient = expected.gradients.get(name, torch.zeros_like(weight))
        worst["gradients"] = max(
            worst["gradients"], relative(gradients[name], gradient, 1e-6 * expected.norm)
        )
        worst["weights"] = max(worst["weights"], relative(weights[name], weight, 0.0))
    return worst


def relative(actual: Tensor, expected: Tensor, floor: float) -> float:
    """Largest difference over the largest value of `expected`, or over `floor` where all values
    are smaller.
    """
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    scale = max(expected.abs().max().item(), floor)
    return (actual.to(expected.device, expected.dtype) - expected).abs().max().item() / scale
