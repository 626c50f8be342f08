"""What a card says of itself in a step: torch's allocator, and NVML's memory, power and energy."""

from types import ModuleType
from typing import Any

import torch

NAMES = ("allocated_bytes", "reserved_bytes", "device_used_bytes", "power_w", "energy_j")
"""What a card says, by the names of `mopexec.run.metrics.StepMetrics`."""


class Card:
    """One rank's card; says nothing (no key) on a CPU, and nothing of NVML where pynvml is not installed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self._nvml: Any = None
        self._handle: Any = None
        if self.device is not None:
            self._nvml, self._handle = _open(device)
        self._energy = 0

    def begin(self) -> None:
        """A step begins."""
        self._energy = self._millijoules()

    def end(self) -> dict[str, float]:
        """NAMES of the step that `begin` began: the allocator's peaks so far, what all programs use on the
        card now, power now, energy of the step.
        """
        if self.device is None:
            return {}
        found = {
            "allocated_bytes": float(torch.cuda.max_memory_allocated(self.device)),
            "reserved_bytes": float(torch.cuda.max_memory_reserved(self.device)),
        }
        if self._nvml is not None:
            found["device_used_bytes"] = float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            found["power_w"] = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
            found["energy_j"] = (self._millijoules() - self._energy) / 1e3
        return found

    def _millijoules(self) -> int:
        if self._nvml is None:
            return 0
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def _open(device: torch.device) -> tuple[ModuleType | None, Any]:
    """NVML and its handle of a card, found by the card's UUID: CUDA_VISIBLE_DEVICES renumbers devices."""
    try:
        import pynvml
    except ImportError:
        return None, None
    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(device).uuid
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
