"""Layer inputs from forward to backward: on the device, or in pinned host memory while the budget lasts."""

from typing import Any

import torch
from torch import Tensor

from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import category, recategorize
from mopsim.spec import layout
from mopsim.spec.strategy import Activations


def count_on_host(activations: Activations, layers: int, num_bytes: int) -> int:
    """Of `layers` inputs of num_bytes each, how many go to the host: the first ones in forward order."""
    if activations.layer_inputs != "host":
        return 0
    return layout.offloaded_boundaries(layers, num_bytes, activations.host_budget)


class HostInput:
    """An input on the host, copied there beside what follows; its device memory is free once the caller drops
    it. host: where it goes, memory of its own where None.
    """

    def __init__(self, platform: Platform, x: Tensor, host: Tensor | None = None) -> None:
        self.platform = platform
        self.host = platform.host_empty(x.shape, x.dtype, "boundaries") if host is None else host
        self._stored = platform.store((self.host, x))
        self._coming: tuple[Tensor, Any] | None = None

    def prefetch(self) -> None:
        """Start bringing it back, unless it is on its way."""
        if self._coming is not None:
            return
        with category("boundaries"):
            x = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.platform.device)
        self.platform.wait(self._stored, "h2d")
        self.platform.wait(self.platform.record(), "h2d")
        self.platform.copy(x, self.host, "h2d")
        self._coming = (x, self.platform.record("h2d"))

    def take(self) -> Tensor:
        """It, on the device, which is not kept here any longer."""
        self.prefetch()
        assert self._coming is not None
        (x, event), self._coming = self._coming, None
        self.platform.wait(event)
        return x


class LayerInputs:
    """Those of one microbatch, [N, H] each, by layer; the first `on_host` go to host memory that stays.

    Restoring is one ahead: `prefetch(l - 1)` after the core of layer l's attention backward, after the
    layer's memory peak, so at most two restored ones are alive, and one at the peak.
    """

    def __init__(self, platform: Platform, shape: tuple[int, int], dtype: torch.dtype, on_host: int) -> None:
        self.platform = platform
        self._host = [platform.host_empty(shape, dtype, "boundaries") for _ in range(on_host)]
        self._kept: dict[int, Tensor | HostInput] = {}

    def put(self, layer: int, x: Tensor) -> None:
        """Keep x, the input of `layer`."""
        recategorize(x, "boundaries")
        away = layer < len(self._host)
        self._kept[layer] = HostInput(self.platform, x, self._host[layer]) if away else x

    def forget(self) -> None:
        """Drop what is kept for a backward that will not come."""
        self._kept.clear()

    def prefetch(self, layer: int) -> None:
        """Start bringing the input of `layer` back; nothing where it is on the device, or there is none."""
        kept = self._kept.get(layer)
        if isinstance(kept, HostInput):
            kept.prefetch()

    def take(self, layer: int) -> Tensor:
        """The input of `layer`, on the device; it is not kept any longer."""
        kept = self._kept.pop(layer)
        return kept.take() if isinstance(kept, HostInput) else kept
