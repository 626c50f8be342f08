"""An MTP module of the flat_units schedule: a layer with what is before and after it, in the layer's unit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mopexec.flat.layer import LayerSchedule
from mopexec.measure.tracker import component, phase
from mopexec.operators.joined_inputs import embedded_backward, hidden_backward, join
from mopexec.operators.norms import LayerNorms, Weights

_FINAL = "final_norm"


class MtpSchedule(LayerSchedule):
    """Kept from forward to backward: the embeddings, the layer's input and its output. norm: the weights
    of its final norm, copies that stay while its unit is away.
    """

    norm: Weights

    def __init__(self, *layer: Any, index: int, norms: LayerNorms) -> None:
        super().__init__(*layer)
        self._prefix, self._norms = f"mtp.{index}.", norms

    def join(self, before: Tensor, norm: Weights, embedded: Tensor) -> Tensor:
        """The layer's input [N, H]. before: output of the layers, or module, before, [N, H], whose final norm
        has these weights.
        """
        weights = self._own(self.dense.weights())
        self.norm = {name: value.clone() for name, value in weights.items() if name.startswith(_FINAL)}
        self._embedded = embedded
        with component("vocabulary"):
            hidden = self._norms.forward(before, norm, _FINAL)
        return join(hidden, embedded, weights, self._norms)

    def final_backward(self, grad: Tensor, output: Tensor) -> None:
        """grad [N, H] of the module's normed output becomes that of its layer's, in place."""
        with component("vocabulary"), phase("backward"):
            dtype = self.dense.reduce_dtype
            self._of_norm = {name: torch.zeros_like(value, dtype=dtype) for name, value in self.norm.items()}
            self._norms.backward_(grad, output, grad, self.norm, self._of_norm, _FINAL, add=False)

    def module_backward(
        self, x: Tensor, grad: Tensor, before: Tensor, norm: Weights, grad_before: Tensor,
        before_grads: Callable[[], None],
    ) -> None:  # fmt: skip
        """As `backward`, of what is before the layer too: grad [N, H] becomes the gradient of the embeddings,
        grad_before [N, H] += that of what a final norm of these weights made of `before`.
        """
        self._before = (before, norm, grad_before)
        self.backward(x, grad, before_grads, lambda: None)

    def _begins(self, grad: Tensor, weights: Weights, grads: Weights) -> None:
        """See `LayerSchedule._begins`."""
        before, norm, grad_before = self._before
        del self._before
        weights, grads = self._own(weights), self._own(grads)
        for name, value in self._of_norm.items():
            grads[name].add_(value)
        with component("vocabulary"), phase("backward"):
            hidden = self._norms.forward(before, norm, _FINAL)
        hidden_backward(grad, hidden, weights, grads, self._norms, grad_before)
        del hidden
        embedded_backward(grad, self._embedded, weights, grads, self._norms)
        del self._embedded

    def _own(self, values: Weights) -> Weights:
        """The module's parameters by their names in it."""
        mine = (name for name in values if name.startswith(self._prefix))
        return {name.removeprefix(self._prefix): values[name] for name in mine}
