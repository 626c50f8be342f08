"""Layer inputs from forward to backward: on the device, or in pinned host memory while the budget lasts."""

from typing import Any

import torch
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, recategorize
from mopsim.spec import layout
from mopsim.spec.strategy import Activations


class Boundaries:
    """Boundaries of one microbatch, `count` of [N, H]; the first ones in forward order go to the host tier.

    Restoring is one ahead: `prefetch(l - 1)` during layer l's attention backward, after the layer's memory
    peak, so at most two restored ones are alive, and one at the peak.
    """

    def __init__(
        self,
        activations: Activations,
        count: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        platform: Platform,
    ) -> None:
        self.platform, self.shape, self.dtype = platform, shape, dtype
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        self.offloaded = 0
        if activations.layer_inputs == "host":
            self.offloaded = layout.offloaded_boundaries(count, num_bytes, activations.host_budget)
        self._host = [platform.host_empty(shape, dtype, "boundaries") for _ in range(self.offloaded)]
        self._kept: dict[int, Tensor] = {}
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._stored: Any = None

    def put(self, layer: int, x: Tensor) -> None:
        """Keep x, the input of `layer`. The device copy of an offloaded one dies when the caller drops it."""
        recategorize(x, "boundaries")
        if layer >= self.offloaded:
            self._kept[layer] = x
            return
        self._stored = self.platform.store((self._host[layer], x))

    def forget(self) -> None:
        """Drop what is kept for a backward that will not come."""
        self._kept.clear()

    def prefetch(self, layer: int) -> None:
        """Start bringing an offloaded boundary back; nothing for others."""
        if not 0 <= layer < self.offloaded or layer in self._coming:
            return
        with category("boundaries"):
            x = torch.empty(self.shape, dtype=self.dtype, device=self.platform.device)
        self.platform.wait(self._stored, "h2d")
        self.platform.wait(self.platform.record(), "h2d")
        self.platform.copy(x, self._host[layer], "h2d")
        self._coming[layer] = (x, self.platform.record("h2d"))

    def take(self, layer: int) -> Tensor:
        """The input of `layer`, on the device; it is not kept any longer."""
        if layer >= self.offloaded:
            return self._kept.pop(layer)
        self.prefetch(layer)
        x, event = self._coming.pop(layer)
        self.platform.wait(event)
        return x
