"""What this machine is: cores, memory, and the GPU as NVML knows it."""

import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mopexec.measure.card import nvml_of
from mopsim.common.errors import MopError

DENSE_PEAKS: dict[str, dict[str, float]] = {
    "H200 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 60e12},
    "H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12},
    "H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 60e12},
    "H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "H800": {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
    "B200": {"bfloat16": 2250e12, "float16": 2250e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12},
}
"""FLOP/s without sparsity, NVIDIA's datasheets; float32 without TF32 (torch's default for matmuls)."""

CUDNN_ATTENTION = 91501
"""The first cuDNN whose attention is right at lengths that are no multiple of 128 (pytorch issue 169849)."""


@dataclass(frozen=True)
class Gpu:
    """name; memory in bytes; power limit in watts (None where NVML does not tell)."""

    name: str
    memory: int
    power: float | None


def cpu_model() -> str:
    """The processor's name as the kernel tells it, or the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def architecture(device: torch.device) -> str:
    """The generation of a card where stacks choose cuDNN's attention for it and this torch has that; else '':
    then they choose as for a card that is not known, and the profile's own rate of attention counts.
    """
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return ""
    known = {9: "hopper", 10: "blackwell"}.get(torch.cuda.get_device_capability(device)[0], "")
    return known if (torch.backends.cudnn.version() or 0) >= CUDNN_ATTENTION else ""  # type: ignore[no-untyped-call]


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def usable_cores() -> list[int]:
    """Cores that this process may use: its affinity, held to the container's CPU quota."""
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    quota = _cgroup("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = cores[: max(1, math.ceil(int(quota[0]) / int(quota[1])))]
    return cores


def threads_of_rank(cores: int, ranks: int) -> int:
    """Threads of each rank with a GPU on a node: those of AdamW on the host."""
    return max(1, cores // ranks)


def machine_memory() -> int:
    """Bytes of RAM that this process may use: the machine's, held to the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def pin_to(*cores: int) -> None:
    """Keep this thread (and the threads it will start) on these cores, where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(cores))


def gpu(index: int) -> Gpu:
    """Name, memory and power limit of CUDA device `index`, from NVML; from torch where NVML is missing."""
    properties = torch.cuda.get_device_properties(index)
    nvml, handle = nvml_of(torch.device("cuda", index))
    if nvml is not None:
        try:
            name = nvml.nvmlDeviceGetName(handle)
            memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            power = nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
            return Gpu(name if isinstance(name, str) else name.decode(), memory, power)
        except nvml.NVMLError:
            pass
    return Gpu(properties.name, properties.total_memory, None)


def dense_peak(gpu_name: str, dtype: str) -> float | None:
    """Datasheet FLOP/s of a known card, else None."""
    for key, peaks in DENSE_PEAKS.items():
        if all(word in gpu_name for word in key.split()):
            return peaks.get(dtype)
    return None


def check_ranks(ranks: int | None, available: int, what: str) -> int:
    """The number of ranks to probe with. Raises MopError where the user asks for too few or too many."""
    if ranks is None:
        return available
    if not 1 <= ranks <= available:
        raise MopError(f"--ranks: {ranks} must lie between 1 and the {available} {what} of this machine")
    return ranks


def _cgroup(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
