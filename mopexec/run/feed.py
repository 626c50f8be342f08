"""Which tokens this rank trains on: its data group's sequences, its place's slice of each."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mopexec.data import TokenDataset, sequence_indices
from mopexec.run.runner import Batch
from mopsim.spec import layout
from mopsim.spec.plan import Plan


class Feed:
    """Batches of one rank: for every layout of the ranks a step takes the same sequences of the dataset."""

    def __init__(self, plan: Plan, dataset: TokenDataset, rank: int, device: torch.device) -> None:
        strategy, training = plan.strategy, plan.training
        mine, degree = layout.place(strategy, rank), strategy.attention.context_parallel
        self.group, self.place = mine.data, mine.context
        self.start, self.stop = layout.interval(training.seq_len, degree, self.place)
        self.global_batch, self.micro_batch = training.global_batch, strategy.micro_batch
        self.data_groups, self.num_microbatches = strategy.data_groups, training.num_microbatches(strategy)
        self.dataset, self.device = dataset, device

    def batches(self, step: int) -> list[Batch]:
        """The microbatches of step `step` (from 0), each [micro_batch, seq_len / D]. Their num_targets is 0
        where no target of the global batch counts.
        """
        first = step * self.global_batch
        counted = self.dataset.num_targets(range(first, first + self.global_batch))
        return [self._batch(step, microbatch, counted) for microbatch in range(self.num_microbatches)]

    def _batch(self, step: int, microbatch: int, counted: int) -> Batch:
        indices = sequence_indices(
            step,
            microbatch,
            self.group,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            data_groups=self.data_groups,
        )
        tokens, targets = self.dataset.batch(indices, self.start, self.stop)
        documents = self.dataset.documents(indices)
        return Batch(self._on_device(tokens), self._on_device(targets), counted, documents)

    def _on_device(self, values: npt.NDArray[np.int64]) -> Tensor:
        """A tensor of its own memory, so that a tracker counts it."""
        tensor = torch.empty(values.shape, dtype=torch.int64, device=self.device)
        return tensor.copy_(torch.from_numpy(values))
