"""The parallel step against the single-device step, on this machine's ranks: losses, gradients, updated
weights."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mopexec.data.dataset import IGNORED
from mopexec.model import Transformer
from mopexec.model.auxiliary import Auxiliary
from mopexec.operators.adamw import groups
from mopexec.operators.documents import Documents, spans
from mopexec.run import failures, plans
from mopexec.run.apply import build
from mopexec.run.environment import launcher
from mopexec.run.job import RankJob, join, meet
from mopexec.run.runner import Batch
from mopexec.run.signals import end_on_interrupts
from mopexec.weights.load import fill
from mopexec.weights.source import Seeded
from mopsim.common import io
from mopsim.common.io import Spec
from mopsim.common.processes import end_with_parent
from mopsim.spec import layout
from mopsim.spec.plan import Plan

TOLERANCE = 1e-9  # relative, in float64
ROUNDED = sys.float_info.epsilon / TOLERANCE
"""Of the norm: a gradient may differ by its rounding. That is all there is to one of what the loss does not
depend on: keys' bias without rotation, or the router whose one expert's weight is normalised to 1 (1e-19 of
the norm, where the least of others are 1e-5)."""


class Differences(Spec, frozen=True, kw_only=True):
    """Largest differences over the steps: the loss's and the norm's relative to themselves, each gradient's
    and each weight's to the largest entry of that tensor, which counts as ROUNDED of the norm, and as the
    learning rate, at least."""

    loss: float
    grad_norm: float
    gradients: float
    weights: float
    worst_gradient: str
    worst_weight: str

    @property
    def passed(self) -> bool:
        return max(self.loss, self.grad_norm, self.gradients, self.weights) <= TOLERANCE


class Reference:
    """The single-device model with torch's own clipping and AdamW."""

    def __init__(self, plan: Plan) -> None:
        training = plan.training
        self.training = training
        self.model = Transformer(plan.model, torch.float64, "cpu")
        self.model.set_auxiliary(Auxiliary.of(training))
        fill(self.model, Seeded(training.seed))
        self.optimizer = torch.optim.AdamW(
            groups(self.model.named_parameters(), training.weight_decay),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
        )
        self.gradients: dict[str, Tensor] = {}

    def step(self, inputs: Tensor, targets: Tensor, documents: Documents) -> tuple[float, float]:
        """Loss and gradient norm of one step on the global batch [B, S], documents one by one; keeps the
        gradients before clipping."""
        self.optimizer.zero_grad()
        scale, loss = 1 / int((targets >= 0).sum()), 0.0
        alone = documents and not self.training.router_aux_loss_coef  # which counts routes of a sequence
        for at in spans(documents) if alone else [slice(None)]:
            part = self.model.loss(
                inputs[at], targets[at].contiguous(), scale=scale, documents=() if alone else documents
            )
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self.model.named_parameters()
        }
        most = self.training.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        self.optimizer.step()
        self.model.update_balance(self.training.bias_update_rate)
        return loss, norm.item()


Targets = Callable[[Tensor, Documents], Tensor]
"""Targets [B, S] of tokens [B, S + 1] and their documents."""


def targets_of(tokens: Tensor, documents: Documents) -> Tensor:
    """The next tokens, but for the last of each document."""
    targets = tokens[:, 1:].clone()
    for row, ends in enumerate(documents):
        targets[row, [end - 1 for end in ends]] = IGNORED
    return targets


def compare(plan: Plan, job: RankJob, steps: int, targets_of: Targets = targets_of) -> Differences | None:
    """Train `plan` and, on the first rank, the single-device model on the same random tokens; None on other
    ranks."""
    runner = build(plan, job.platform, routing="learned", seed=plan.training.seed)
    runner.keep_gradients()
    reference = Reference(plan) if job.rank == 0 else None
    found = {"loss": 0.0, "grad_norm": 0.0}
    worst = {"gradients": (0.0, ""), "weights": (0.0, "")}
    for step in range(steps):
        tokens, documents = _tokens(plan, step)
        targets = targets_of(tokens, documents)
        result = runner.step(_batches(plan, tokens, targets, documents, job))
        gradients, weights = runner.full_gradients(), runner.full_parameters()
        if reference is None:
            continue
        loss, norm = reference.step(tokens[:, :-1], targets, documents)
        found["loss"] = max(found["loss"], abs(result.loss - loss) / abs(loss))
        found["grad_norm"] = max(found["grad_norm"], abs(result.grad_norm - norm) / norm)
        for name, weight in reference.model.named_parameters():
            for kind, ours, theirs, least in (
                ("gradients", gradients[name], reference.gradients[name], ROUNDED * norm),
                ("weights", weights[name], weight.detach(), plan.training.learning_rate),
            ):
                worst[kind] = max(worst[kind], (_relative(ours, theirs, least), name))
    if reference is None:
        return None
    return Differences(
        loss=found["loss"],
        grad_norm=found["grad_norm"],
        gradients=worst["gradients"][0],
        weights=worst["weights"][0],
        worst_gradient=worst["gradients"][1],
        worst_weight=worst["weights"][1],
    )


def _tokens(plan: Plan, step: int) -> tuple[Tensor, Documents]:
    """The global batch of a step [global_batch, seq_len + 1] and its documents, where they are trained apart;
    the same on every rank."""
    generator = torch.Generator().manual_seed(plan.training.seed + step)
    shape = (plan.training.global_batch, plan.training.seq_len + 1)
    tokens = torch.randint(0, plan.model.vocab_size, shape, generator=generator)
    if plan.training.attention_mask == "causal":
        return tokens, ()
    length = plan.training.seq_len
    cuts = torch.randint(1, length + 1, (plan.training.global_batch, 3), generator=generator)
    return tokens, tuple(tuple(sorted({*row, length})) for row in cuts.tolist())


def _batches(plan: Plan, tokens: Tensor, targets: Tensor, documents: Documents, job: RankJob) -> list[Batch]:
    """This rank's microbatches of the global batch, as the feed would cut them."""
    strategy, training = plan.strategy, plan.training
    place = layout.place(strategy, job.rank)
    start, stop = layout.interval(training.seq_len, strategy.attention.context_parallel, place.context)
    found, device = [], job.platform.device
    counted = int((targets >= 0).sum())
    for index in range(training.num_microbatches(strategy)):
        first = (index * strategy.data_groups + place.data) * strategy.micro_batch
        rows = slice(first, first + strategy.micro_batch)
        mine, next_ones = (values[rows, start:stop].contiguous().to(device) for values in (tokens, targets))
        found.append(Batch(mine, next_ones, counted, documents[rows]))
    return found


def _relative(ours: Tensor, theirs: Tensor, least: float) -> float:
    """Largest difference over the largest entry of `theirs`, which counts as `least` at least."""
    scale = max(theirs.abs().max().item(), least, 1e-30)
    return (ours.to("cpu", torch.float64) - theirs).abs().max().item() / scale


def main() -> None:
    """One rank: `-m mopexec.check.verify FOLDER STEPS`; reads plan.yaml there, writes differences.json."""
    end_with_parent(launcher())
    end_on_interrupts()
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    failure = None
    try:
        with join(meet()) as job:
            found = compare(plans.read_plan(folder / "plan.yaml"), job, steps)
            if found is not None:
                io.write_json(str(folder / "differences.json"), found)
    except Exception as error:
        failure = failures.report(folder / failures.LOGS, int(os.environ["RANK"]), error)
    os._exit(failures.exit_code(failure))


if __name__ == "__main__":
    main()
