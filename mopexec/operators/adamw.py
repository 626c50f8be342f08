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


LANES = 64
"""Elements of a multiple of every CPU's vector."""


def sliced_adamw_(
    masters: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], step: Tensor, rate: float, training: TrainSpec, room: Tensor, *,
    decay: bool,
) -> None:  # fmt: skip
    """`adamw_` of slices [numel] of parameters: what becomes of an element is the same in every slice.

    On a CPU torch's kernel rounds otherwise where elements of a slice do not fill a vector (float32, by one
    unit of the last place): those are updated in room [4, LANES].
    """
    kinds = (masters, grads, exp_avgs, exp_avg_sqs)
    rest = [tensor.numel() % LANES if room.device.type == "cpu" else 0 for tensor in masters]
    held, given, first, second = (
        [t[: t.numel() - n] for t, n in zip(kind, rest, strict=True) if t.numel() > n] for kind in kinds
    )
    if held:
        adamw_(held, given, first, second, [step] * len(held), rate, training, decay=decay)
    for place, count in enumerate(rest):
        if count:
            ends = [kind[place][-count:] for kind in kinds]
            filled = list(room.zero_())
            for own, end in zip(filled, ends, strict=True):
                own[:count].copy_(end)
            held, given, first, second = ([own] for own in filled)
            adamw_(held, given, first, second, [step], rate, training, decay=decay)
            for own, end in zip(filled, ends, strict=True):
                end.copy_(own[:count])


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients of global norm `norm` (0-dim) are multiplied by, as torch.nn.utils.clip_grad_norm_ does
    it; clip_norm 0: 1.
    """
    return (clip_norm / (norm + 1e-6)).clamp_(max=1.0) if clip_norm else torch.ones_like(norm)
