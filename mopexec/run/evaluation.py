"""Held-out data during a run, and where a run's tokens are."""

from functools import partial
from pathlib import Path

import torch.distributed as dist

from mopexec import data
from mopexec.run.feed import Feed
from mopexec.run.job import RankJob
from mopexec.run.kept import keep_trained
from mopexec.run.options import TrainOptions
from mopexec.run.runner import Runner
from mopsim.common.errors import MopError
from mopsim.spec import layout
from mopsim.spec.plan import Plan


class Evaluation:
    """The same first sequences of the held-out data, each time, each window once."""

    def __init__(self, feed: Feed, batches: int, every: int, steps: int) -> None:
        self.feed, self.batches, self.every, self.steps = feed, batches, every, steps

    @classmethod
    def of(cls, options: TrainOptions, plan: Plan, job: RankJob, seed: int) -> "Evaluation | None":
        """None where there is no held-out data."""
        if options.eval_data is None:
            return None
        tokens = (
            Path(options.eval_tokens) if options.eval_tokens else tokens_of(options, plan, job, held_out=True)
        )
        dataset, batches = open_held_out(tokens, options, plan, seed)
        feed = Feed(plan, dataset, job.rank, job.platform.device)
        return cls(feed, batches, options.eval_every, options.steps)

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` (from 1)."""
        return step == self.steps or (self.every > 0 and step % self.every == 0)

    def loss(self, runner: Runner) -> float:
        """Mean over the targets that count in all global batches."""
        total, counted = 0.0, 0
        for index in range(self.batches):
            batches = self.feed.batches(index)
            if targets := batches[0].num_targets:
                total, counted = total + targets * runner.evaluate(batches), counted + targets
        return total / counted


def open_held_out(tokens: Path, options: TrainOptions, plan: Plan, seed: int) -> tuple[data.HeldOut, int]:
    """The held-out data and how many global batches an evaluation takes, the last one filled up. Raises
    MopError where none of their targets counts.
    """
    size = plan.training.global_batch
    dataset = data.open_held_out(tokens, plan.training, seed, options.eval_batches * size)
    batches = layout.ceil_div(len(dataset.places), size)
    if not dataset.num_targets(range(batches * size)):
        raise MopError(f"--eval-batches: no target of the first {batches} of --eval-data counts in the loss")
    return dataset, batches


def training_tokens(options: TrainOptions, plan: Plan, job: RankJob) -> Path:
    """The directory of the tokens to train on; the run keeps the tokenizer that they were trained."""
    found = tokens_of(options, plan, job)
    if job.rank == 0:
        keep_trained(Path(options.out), found)
    return found


def tokens_of(options: TrainOptions, plan: Plan, job: RankJob, *, held_out: bool = False) -> Path:
    """The tokens' directory: prepared by the launching command, or by the first rank of each node."""
    if options.tokens and not held_out:
        return Path(options.tokens)
    cache = data.cache_directory(options.cache)
    prepared = partial(data.prepare_all, options.data, options.eval_data, plan.model.vocab_size, cache)
    mine = prepared() if job.local_rank == 0 else None
    dist.barrier()
    training, evaluation = mine or prepared()
    return evaluation if held_out and evaluation else training
