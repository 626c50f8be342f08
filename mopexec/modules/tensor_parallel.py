"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198): the ranks of a group split
heads and FFN columns; between those regions each holds its part of the rows.

A region begins with a gather of the rows and ends with a reduce-scatter of partial sums. Only a rank's own
rows are kept for the backward, which gathers them again for the gradients of the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mopexec.distributed.mesh import Group
from mopexec.model.attention import OwnRows, Weights
from mopexec.model.kept import product
from mopexec.model.transformer import DecoderLayer
from mopexec.modules.exchange import exchange
from mopexec.operators.again import kept
from mopexec.operators.put_off import gradients
from mopexec.operators.tensor_parallel import (
    gather_rows,
    of_inputs,
    of_weights,
    products_forward,
    scatter_rows,
)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, names: Sequence[str], biases: Sequence[Tensor | None],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        weights = tensors[: len(biases)]
        ctx.group, ctx.biased = group, [bias is not None for bias in biases]
        ctx.save_for_backward(x, *weights)
        return kept(partial(products_forward, x, group, weights, biases), *names)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        grad_x = of_inputs(grads, ctx.group, weights)
        found = gradients(partial(of_weights, ctx.group), (x, *grads), weights)
        biases = [grad.flatten(0, -2).sum(0) for grad, one in zip(grads, ctx.biased, strict=True) if one]
        return grad_x, None, None, None, *found, *biases


def products(
    x: Tensor, group: Group, weights: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[Tensor, ...]:
    """x [.., m, H] gathered over the group, times each named weight [out, H]^T, plus its bias if there is
    one; kept together or not (activations.save_ops)."""
    biases = [weights.get(f"{name}.bias") for name in names]
    given = [weights[f"{name}.weight"] for name in names] + [bias for bias in biases if bias is not None]
    found: tuple[Tensor, ...] = _Products.apply(x, group, names, biases, *given)  # type: ignore[no-untyped-call]
    return found


def sum_rows(x: Tensor, group: Group) -> Tensor:
    """Partial sums [.., n * m, H] added up; each rank keeps its rows."""
    return exchange(x, partial(scatter_rows, group=group), partial(gather_rows, group=group))


class SplitRows(OwnRows):
    """`mopexec.model.attention.Rows` of a tensor-parallel region."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def products(self, weights: Weights, names: Sequence[str], x: Tensor) -> Iterator[Tensor]:
        """x times each of the named weights, which are slices of outputs."""
        return iter(products(x, self._group, weights, names))

    def whole(self, x: Tensor) -> Tensor:
        """The rows of all ranks."""
        group = self._group
        return exchange(x, partial(gather_rows, group=group), partial(scatter_rows, group=group))


class RowParallel:
    """A drop-in for the forward of a linear whose inputs are split: partial sums are added and scattered."""

    def __init__(self, name: str, module: Any, group: Group) -> None:
        self._name, self._module, self._group = name, module, group

    def __call__(self, x: Tensor) -> Tensor:
        out = sum_rows(product(self._name, x, self._module.weight), self._group)
        return out if self._module.bias is None else out + self._module.bias


class SplitFeedForward:
    """A drop-in for the forward of a FeedForward whose columns are split."""

    def __init__(self, module: Any, group: Group) -> None:
        self._module, self._group = module, group

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # positions do not matter here
        weights = dict(self._module.named_parameters())
        wings = list(products(rows, self._group, weights, self._module.firsts))
        inner = self._module.activate(*wings)
        wings.clear()  # what nothing keeps is gone before the next product
        out: Tensor = self._module.down_proj(inner)
        return out.view_as(x)


def split_layer(layer: DecoderLayer, group: Group) -> None:
    """Make a layer's regions those of the group; its parameters are this rank's slices."""
    attention: Any = layer.attention
    attention.rows = SplitRows(group)
    attention.o_proj.forward = RowParallel("o_proj", attention.o_proj, group)
    dense: Any = layer.moe.shared if layer.is_moe else layer.ffn
    if dense is not None:
        dense.down_proj.forward = RowParallel("down_proj", dense.down_proj, group)
        dense.forward = SplitFeedForward(dense, group)
