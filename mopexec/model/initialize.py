"""Initial weights that depend on a parameter's name and the seed alone, so that every sharding starts the
same.
"""

import hashlib

import torch
from torch import Tensor

STANDARD_DEVIATION = 0.02


def initial_value(name: str, shape: tuple[int, ...], seed: int, index: int | None) -> Tensor:
    """Parameter `name` (or slice `index` of its first dimension, then `shape` is the slice's) in float32 on
    the CPU.

    Norm weights are 1 and biases 0; everything else is drawn from N(0, 0.02) by a generator seeded with
    (seed, name, index).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)


def is_stacked(name: str) -> bool:
    """Whether `name` holds one matrix per expert, each drawn on its own."""
    return ".experts." in name
