"""How `fully_shard` communicates here: its buffers named for the memory tracker, its collectives through
our seam.

Also the host tier on a CPU: there `.to("cpu")` copies nothing, so the copies that CPUOffloadPolicy makes on
a GPU (shard to the device before the all-gather, reduced gradient back to the host) are made explicitly.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import category, host_compute
from mopexec.measure.tracker import mark_host, recategorize
from mopexec.modules.fsdp_internals import AllGather, ReduceScatter, copy_to_device_first, shards


class _Pending(dist.Work):
    """Whatever our collectives return, as the `dist.Work` that FSDP waits for."""

    def __init__(self, inner: collectives.Waitable) -> None:
        super().__init__()
        self._inner = inner

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._inner.wait()
        return True


class TrackedAllGather(AllGather):
    """FSDP's default all-gather, its output buffer booked as `gathered`."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        with category("gathered"):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        work = collectives.all_gather_single(output_tensor, input_tensor, group, async_op)
        return _Pending(work) if async_op else None


class TrackedReduceScatter(ReduceScatter):
    """FSDP's default reduce-scatter. Its input is booked as `gathered_grads`, its output as `grads`.

    FSDP asks for the two buffers of a reduction in that order; with a group of one rank it does not call
    the collective.
    """

    def __init__(self) -> None:
        self._next_is_input = True

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        name = "gathered_grads" if self._next_is_input else "grads"
        self._next_is_input = not self._next_is_input
        with category(name):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        assert op == dist.ReduceOp.SUM, "gradients are summed: the loss is divided by the global token count"
        work = collectives.reduce_scatter_single(output_tensor, input_tensor, group, async_op)
        return _Pending(work) if async_op else None


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its storage (no DTensor op is dispatched)."""
    return cast(Tensor, cast(Any, tensor)._local_tensor) if isinstance(tensor, DTensor) else tensor


def place_on_host(model: nn.Module, platform: Platform, grads: dict[str, Tensor]) -> None:
    """Put the shards of a CPU-offloaded model in the host tier; reduced gradients arrive in `grads` by
    parameter name.

    On CUDA FSDP itself copies: asynchronously while a gradient is the first of its parameter in a step, else
    it waits for the copy and adds it on the CPU. The tracker knows the tier by the device.
    """
    for shard in shards(model):
        mark_host(shard, "params")
    if not platform.is_cuda:
        copy_to_device_first(model)
        for name, parameter in model.named_parameters():
            hook = _GradToHost(name, platform, grads)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


class _GradToHost:
    """Moves a freshly reduced gradient shard to its host buffer, adding to what is there; frees it on the
    device."""

    def __init__(self, name: str, platform: Platform, grads: dict[str, Tensor]) -> None:
        self._name, self._platform, self._grads = name, platform, grads

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        fresh = local(parameter.grad)
        arrived = self._platform.host_empty(fresh.shape, fresh.dtype, "grads")
        self._platform.copy(arrived, fresh)
        if self._name in self._grads:
            with host_compute():
                self._grads[self._name].add_(arrived)
        else:
            self._grads[self._name] = arrived
        parameter.grad = None


def book_gradients(model: nn.Module) -> None:
    """Book each reduced gradient shard as `grads` as soon as FSDP sets it (it may have cast it to another
    dtype)."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_book_shard)  # type: ignore[no-untyped-call]


def _book_shard(parameter: Tensor) -> None:
    if parameter.grad is not None:
        recategorize(local(parameter.grad), "grads")
