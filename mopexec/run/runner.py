"""What every runtime offers to the training loop."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.operators.documents import Documents


@dataclass(frozen=True)
class Batch:
    """One rank's slice of one microbatch: tokens and targets, each [micro_batch, seq_len / D] int64.

    A target below 0 does not count in the loss; num_targets: how many of the global batch count. 0 is all
    or none, whose losses are 0 whatever divides them.
    The sequence slice is contiguous: place p of a sequence group holds positions [p * S/D, (p + 1) * S/D).
    documents: of the whole sequences.
    """

    tokens: Tensor
    targets: Tensor
    num_targets: int = 0
    documents: Documents = ()


@dataclass(frozen=True)
class StepResult:
    """loss: mean per counted target; grad_norm: before clipping.

    busiest: part of a layer's routes that went to the expert-parallel rank that got most, mean over layers;
    nan where no router chose. expert_loads: experts of all layers by their load over the even one, below 1/8,
    from 1/8 on, .. by doubling, from 8 on (`mopexec.model.routing.load_histogram`); () where no router chose.
    """

    loss: float
    grad_norm: float
    busiest: float = math.nan
    expert_loads: tuple[int, ...] = ()

    @classmethod
    def fetched(cls, found: list[Tensor], platform: Platform) -> "StepResult":
        """Of tensors of the device: loss, grad_norm and, where a router chose, `balance_told`. The host waits
        once; without data nothing is known.
        """
        if platform.fake:
            return cls(math.nan, math.nan)
        loss, norm, *told = platform.fetch(torch.cat([one.double().reshape(-1) for one in found]))
        if not told:
            return cls(loss, norm)
        return cls(loss, norm, told[0], tuple(map(int, told[1:])))


class Runner(Protocol):
    """One rank of a training run."""

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step on this rank's microbatches."""
        ...

    def evaluate(self, batches: list[Batch]) -> float:
        """Mean loss per counted target of a global batch, on every rank; training goes on as if it had not
        been asked.
        """
        ...

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the training state, for torch.distributed.checkpoint (reshards on load)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave and the checkpoint filled."""
        ...

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, gathered on every rank (tests, export)."""
        ...

    def keep_gradients(self) -> None:
        """Gradients of the steps from now on outlive them, for `full_gradients`."""
        ...

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient by name, of the last step, before clipping, gathered on every rank (tests)."""
        ...
