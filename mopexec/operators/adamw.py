"""The update of AdamW (arXiv 1711.05101), as torch.optim.AdamW makes it: decoupled decay of all but norms,
biases and sinks, by torch's fused kernel.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mopsim.spec.training import TrainSpec

Intervals = Sequence[tuple[int, int]]
"""[start, stop) of elements, in order."""


def decays(name: str) -> bool:
    """Whether the parameter of this name decays: no norm, no bias, no sink does."""
    return not name.endswith(("norm.weight", "bias", "sinks"))


def groups(named: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters as torch.optim.AdamW wants them, those that decay and those that do not."""
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in named:
        found[decays(name)].append(parameter)
    return [{"params": some, "weight_decay": weight_decay * on} for on, some in found.items() if some]


def runs(start: int, stop: int, undecayed: Intervals) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether they decay) of the elements [start, stop), run by run."""
    for low, high in undecayed:
        low, high = max(low, start), min(high, stop)
        if low < high:
            if start < low:
                yield start, low, True
            yield low, high, False
            start = high
    if start < stop:
        yield start, stop, True


def adamw_(
    masters: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], rate: float, training: TrainSpec, *,
    decay: bool = True,
) -> None:  # fmt: skip
    """masters and moments, equally many tensors of one dtype and device, after the update by grads at
    learning rate `rate`, in place. steps: 0-dim float32 of each, this update counted. decay: of all.
    """
    torch._fused_adamw_(
        list(masters),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        lr=rate,
        beta1=training.beta1,
        beta2=training.beta2,
        weight_decay=training.weight_decay if decay else 0.0,
        eps=training.eps,
        amsgrad=False,
        maximize=False,
    )


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients of global norm `norm` (0-dim) are multiplied by, as torch.nn.utils.clip_grad_norm_ does
    it; clip_norm 0: 1.
    """
    return (clip_norm / (norm + 1e-6)).clamp_(max=1.0) if clip_norm else torch.ones_like(norm)
