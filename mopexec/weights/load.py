"""The single-device model filled from a source."""

import torch
from torch import nn

from mopexec.model.initialize import is_stacked
from mopexec.weights.source import Source


@torch.no_grad()
def fill(model: nn.Module, source: Source) -> None:
    """Every parameter and buffer of `model`, in place."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if is_stacked(name):
            for index in range(shape[0]):
                parameter[index].copy_(source.read(name, shape[1:], index))
        else:
            parameter.copy_(source.read(name, shape))
    for name, buffer in model.named_buffers():
        value = source.buffer(name)
        if value is not None:
            buffer.copy_(value)
