"""Which implementation of an operation runs: what the plan's stack says (`stack.kernels`), during its step.

Plain module state, as `mopexec.measure.scope`: for real tensors and for those without data, so that a dry run
plays what the planned device would run. Before any `using`, a CPU's choice holds.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mopexec.measure.probe_machine import CUDNN_ATTENTION
from mopsim.common.errors import SpecError
from mopsim.spec.stack import Kernels

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of the fused attention kernels for GPUs."""
DEFAULT_OF_GPUS = "flash2"
"""Their attention kernel where none is planned."""


class Choice:
    """norm, rotary, activation, router, rows (of routes): one kernel each (`fused`). grouped: one product for
    all experts. attention: the stack's word for its kernel; "cpu": torch's flash kernel for CPUs.
    """

    __slots__ = ("activation", "attention", "grouped", "norm", "rotary", "router", "rows")

    def __init__(self) -> None:
        self.norm = self.rotary = self.activation = self.router = self.rows = self.grouped = False
        self.attention = "cpu"

    def take(self, kernels: Kernels) -> None:
        self.norm, self.rotary = kernels.norm == "fused", kernels.rotary == "fused"
        self.activation, self.router = kernels.activation == "fused", kernels.router == "fused"
        self.rows = kernels.expert_rows == "fused"
        self.grouped = kernels.expert_products == "torch"
        self.attention = kernels.attention.get("default", "profile")


NOW = Choice()


def attention(x: Tensor) -> str:
    """The kernel that attends over x: the planned one if x is where that runs, or has no data and plays it.
    No fused kernel of a GPU takes more than 16 bits (flash_attn/flash_api.cpp; cuDNN): `rows` does.
    """
    planned, played = NOW.attention, x.is_meta or isinstance(x, FakeTensor)
    if planned == "rows":
        return planned
    if not x.is_cuda and (planned == "cpu" or not played):
        return "cpu"
    return "rows" if x.dtype not in HALF else DEFAULT_OF_GPUS if planned == "cpu" else planned


def joins_sums(x: Tensor) -> bool:
    """Whether the kernel saves log-sum-exps [B, heads, S] of all heads first, not those of each repeat."""
    return attention(x) != "cpu"


def prepare(kernels: Kernels) -> None:
    """Activate what torch does not run by default. Raises SpecError where this torch or card has it not."""
    kernel = kernels.attention.get("default")
    cudnn: Any = torch.backends.cudnn
    if kernel == "cudnn" and (found := cudnn.version() or 0) < CUDNN_ATTENTION:
        rule = f"needs cuDNN 9.15.1 or newer, found {found}: CUDA 13's wheels of torch have it"
        ways = "; in the plan {default: flash2} runs FlashAttention-2, slower than planned"
        raise SpecError("stack.kernels.attention", "cudnn", f"{rule}{ways}")
    if kernel != "flash3":
        return
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError("stack.kernels.attention", "flash3", f"cannot be activated: {why}") from None


class using:  # noqa: N801
    """`with using(plan.stack.kernels):` what runs inside, runs by these kernels."""

    __slots__ = ("_kernels", "_outer")

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __enter__(self) -> None:
        self._outer = [getattr(NOW, name) for name in Choice.__slots__]
        NOW.take(self._kernels)

    def __exit__(self, *_: object) -> None:
        for name, value in zip(Choice.__slots__, self._outer, strict=True):
            setattr(NOW, name, value)


class composed:  # noqa: N801
    """`with composed():` row operations run as torch composes them, for its compiler to fuse."""

    __slots__ = ("_outer",)
    _ROWS = ("norm", "rotary", "activation")

    def __enter__(self) -> None:
        self._outer = [getattr(NOW, name) for name in self._ROWS]
        for name in self._ROWS:
            setattr(NOW, name, False)

    def __exit__(self, *_: object) -> None:
        for name, value in zip(self._ROWS, self._outer, strict=True):
            setattr(NOW, name, value)
