"""What a card says of itself in a step: torch's allocator, and NVML's memory, power and energy."""

from types import ModuleType
from typing import Any

import torch

MEMORY = ("allocated_bytes", "reserved_bytes", "device_used_bytes")
NAMES = (*MEMORY, "power_w", "energy_j")
"""What a card says, by the names of `mopexec.run.metrics.StepMetrics`."""

_MEMORY = "nvmlDeviceGetMemoryInfo"
_POWER = "nvmlDeviceGetPowerUsage"
_ENERGY = "nvmlDeviceGetTotalEnergyConsumption"


class Card:
    """One rank's card; says nothing (no key) on a CPU, and nothing of NVML where pynvml is not installed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self._nvml: Any = None
        self._handle: Any = None
        if self.device is not None:
            self._nvml, self._handle = nvml_of(device)
        self._energy: Any = None

    def begin(self) -> None:
        """A step begins."""
        self._energy = self._read(_ENERGY)

    def end(self) -> dict[str, float]:
        """NAMES of the step that `begin` began: the allocator's peaks so far, what all programs use on the
        card now, power now, energy of the step; without what NVML does not tell.
        """
        if self.device is None:
            return {}
        found = {
            "allocated_bytes": float(torch.cuda.max_memory_allocated(self.device)),
            "reserved_bytes": float(torch.cuda.max_memory_reserved(self.device)),
        }
        used, power, energy = (self._read(name) for name in (_MEMORY, _POWER, _ENERGY))
        if used is not None:
            found["device_used_bytes"] = float(used.used)
        if power is not None:
            found["power_w"] = power / 1e3
        if energy is not None and self._energy is not None:
            found["energy_j"] = (energy - self._energy) / 1e3
        return found

    def _read(self, name: str) -> Any:
        """What NVML's function says of the card; None where it does not: of a part of one (MIG), say, or a
        virtual one."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle)
        except self._nvml.NVMLError:
            return None


def nvml_of(device: torch.device) -> tuple[ModuleType | None, Any]:
    """NVML and its handle of a card, found by the card's UUID: CUDA_VISIBLE_DEVICES renumbers devices. None
    without NVML, or where it does not know the card."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None
