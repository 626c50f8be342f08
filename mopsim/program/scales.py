"""Delayed scales of FP8 products as Transformer Engine of 2023 keeps them: each module updates its own from
a history of largest values, on which the ranks of a group agree after each pass of a model chunk."""

from collections.abc import Sequence

from mopsim.graph.tape import Kernel
from mopsim.program.builder import Builder
from mopsim.program.context import Context
from mopsim.program.template import Ops
from mopsim.program.workload import Work

MAXIMA = {"forward": 4 * 3, "backward": 4 * 2}
"""Numbers of a layer's four products: of input, weight and output, of the gradients of output and input."""


def updated(kernels: tuple[Kernel, ...], context: Context) -> tuple[Kernel, ...]:
    """A layer's kernels with those that update its scales in each pass (Kernels.scale_updates)."""
    count = context.stack.kernels.scale_updates
    if not count or context.strategy.precision.matmul != "fp8" or not _products(kernels):
        return kernels
    return (Kernel("scales", "memory_bound", "attention", (), (), launches=count), *kernels)


def agreed(context: Context, issue: Builder, phase: str, layers: Sequence[int], ready: Ops) -> Ops:
    """The end of a chunk's pass: largest values are reduced (Kernels.scale_sums)."""
    group = context.groups.get(context.stack.kernels.scale_sums)
    if group is None or group.size == 1 or context.strategy.precision.matmul != "fp8":
        return ready
    scaled = sum(context.precision(layer).is_cast for layer in layers)
    size = float(context.wide * MAXIMA[phase] * scaled)
    work = Work("all_reduce", bytes=size, group=group)
    return (issue.add("scales", "compute", "attention", phase, (work,), ready),)


def _products(kernels: tuple[Kernel, ...]) -> bool:
    """Whether these are of a layer."""
    return any(one.component == "attention" and one.matmuls for one in kernels)
