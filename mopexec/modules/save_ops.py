"""Recomputation by operator: which products of a layer keep their outputs."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from mopexec.model.attention import OwnRows, Weights
from mopexec.model.kept import product


class _KeptRows(OwnRows):
    def product(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        return product(name, x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


class _KeptLinear:
    """A drop-in for the forward of a linear module."""

    def __init__(self, name: str, module: nn.Linear) -> None:
        self._name, self._module = name, module

    def __call__(self, x: Tensor) -> Tensor:
        return product(self._name, x, self._module.weight, self._module.bias)


def keep_products(layers: Iterable[Any], names: Collection[str]) -> None:
    """Have products of these names keep their outputs in layers. Parts of these that are no modules
    of torch's see to theirs: attention's core, routed experts and their exchanges, what tensor parallelism
    has swapped in.
    """
    for layer in layers if names else ():
        if type(layer.attention.rows) is OwnRows:
            layer.attention.rows = _KeptRows()
        for path, module in layer.named_modules():
            name, own = path.rpartition(".")[2], "forward" not in vars(module)
            if name in names and own and isinstance(module, nn.Linear):
                module.forward = _KeptLinear(name, module)  # type: ignore[method-assign, assignment]
