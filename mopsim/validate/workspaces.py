"""Workspaces of the libraries that multiply matrices, which torch's allocator counts beside tensors."""

from mopsim.common.units import UNITS
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack

TORCH = {"hopper": 32.0, "blackwell": 32.0, "cdna3": 128.0, "cdna4": 128.0}
"""MiB that torch gives each handle of cuBLAS or hipBLAS, by architecture (aten/src/ATen/cuda/
CublasHandlePool.cpp, parseChosenWorkspaceSize; Blackwell is there since torch 2.9)."""
TORCH_ELSE = 2 * 4.0 + 8 / 64
"""As TORCH, other architectures: `:4096:2:16:8`, KiB and how many."""
HANDLES = 2
"""A handle is a thread's: the caller's, and that of autograd's backward."""
ENGINE = {"hopper": 32.0, "blackwell": 32.0}
ENGINE_ELSE = 4.0
"""MiB of Transformer Engine's own (pytorch/module/base.py, v1.8 to v2.7, get_cublas_workspace_size_bytes:
from compute capability 9 on, and before)."""
STREAMS = 4
"""One more for each stream of its grouped products (get_multi_stream_cublas_workspace)."""


def workspaces(stack: Stack, model: ModelSpec, hardware: HardwareProfile) -> int:
    """Bytes of them; none on a CPU, nor where a program has a pool of its own."""
    if hardware.device_kind == "cpu" or stack.pool:
        return 0
    of = hardware.device.architecture
    size = HANDLES * TORCH.get(of, TORCH_ELSE)
    if stack.reading.workspaces == "transformer_engine":
        grouped = model.num_local_experts and stack.kernels.expert_products == "looped"
        size += ENGINE.get(of, ENGINE_ELSE) * (1 + (STREAMS if grouped else 0))
    return int(size * UNITS["MiB"])
