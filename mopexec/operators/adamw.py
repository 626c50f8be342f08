"""The update of AdamW (arXiv 1711.05101), as torch.optim.AdamW makes it: decoupled decay of every element, by
torch's fused kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mopsim.spec.training import TrainSpec


def adamw_(
    masters: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], rate: float, training: TrainSpec,
) -> None:  # fmt: skip
    """masters and moments, equally many tensors of one dtype and device, after the update by grads at
    learning rate `rate`, in place. steps: 0-dim float32 of each, this update counted.
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
        weight_decay=training.weight_decay,
        eps=training.eps,
        amsgrad=False,
        maximize=False,
    )


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients of global norm `norm` (0-dim) are multiplied by, as torch.nn.utils.clip_grad_norm_ does
    it; clip_norm 0: 1.
    """
    return (clip_norm / (norm + 1e-6)).clamp_(max=1.0) if clip_norm else torch.ones_like(norm)
