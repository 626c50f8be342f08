"""What `fully_shard` reaches into of FSDP2 beyond its interface, all of it, for releases of torch to be read
against: nothing here is promised to stay.

| of torch.distributed.fsdp | why |
|---|---|
| `_fully_shard._fsdp_api.AllGather`, `ReduceScatter` | what `set_custom_all_gather` and its like take |
| `FSDPModule._get_fsdp_state()._fsdp_param_groups`, `.fsdp_params` | groups of parameters, and these |
| `FSDPModule._get_fsdp_state()._fsdp_param_group` | the only one, in torch 2.11 |
| `FSDPState._lazy_init` | resets shards before the first forward, when their storage is known |
| `FSDPModule._set_unshard_async_op` | gathers that allocate on the compute stream |
| `FSDPParamGroup.gradient_divide_factor`, `.mesh_info` | gradients of a group are summed |
| `FSDPParamGroup.unshard`, `.post_backward`, `.wait_for_unshard` (replaced) | names for what they allocate |
| `FSDPParamGroup.post_backward`, `.reduce_grads`, `.reshard_after_backward`; \
`FSDPState._root_post_backward_final_callback` | reductions of a backward in two halves |
| `FSDPParam._sharded_param_data`, `._unsharded_param` | tensors of which the tracker is told |
| `FSDPParam.all_gather_inputs` (overridden), `.param_dtype` | on a CPU, the copy from the host of CUDA |
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather as AllGather
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from mopexec.measure.scope import category
from mopexec.measure.tracker import recategorize
from mopexec.operators.put_off import PutOff


def lazy_init(model: nn.Module) -> None:
    """What the first forward would begin with."""
    fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]


def sum_gradients(module: FSDPModule, *, unshard_async: bool) -> None:
    """Gradients are summed over the ranks, not averaged. unshard_async: gathers allocate and copy on the
    compute stream."""
    module.set_force_sum_reduction_for_comms(True)
    module._set_unshard_async_op(unshard_async)
    for group in _groups(module):
        if group.mesh_info.mesh.size() > 1:
            group.gradient_divide_factor = 1.0


def param_groups(model: nn.Module) -> list[Any]:
    """FSDP's parameter groups of a model, in module order, each once."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                seen.setdefault(id(group), group)
    return list(seen.values())


def _groups(module: FSDPModule) -> list[Any]:
    """Those of a module: one at most in torch 2.11, which has no list of them."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def shards(model: nn.Module) -> Iterator[Tensor]:
    """This rank's shard of each parameter, as FSDP gathers it."""
    for group in param_groups(model):
        for param in group.fsdp_params:
            yield param._sharded_param_data


def copy_to_device_first(model: nn.Module) -> None:
    """Offloaded shards on a CPU are copied before they are gathered."""
    for group in param_groups(model):
        for param in group.fsdp_params:
            param.__class__ = _CopiedShard


class _CopiedShard(FSDPParam):
    """An offloaded parameter on a CPU: the host shard is copied to the "device" first, as `.to(device)`
    does on CUDA."""

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        with category("gathered"):
            on_device = torch.empty_like(self._sharded_param_data)
            on_device.copy_(self._sharded_param_data)
            return [on_device if self.param_dtype is None else on_device.to(self.param_dtype)]


def put_off_reductions(model: nn.Module) -> None:
    """Of a backward in two halves the gradients of a group are reduced once the second has made them all."""
    finish = fully_shard.state(model)._root_post_backward_final_callback  # type: ignore[attr-defined]
    for group in param_groups(model):
        group.post_backward = _once_whole(group, group.post_backward, finish)


def _once_whole(group: Any, reduce: Callable[..., Any], finish: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        later = PutOff.now
        held = (param for param in group.fsdp_params if hasattr(param, "_unsharded_param"))
        params = [param._unsharded_param for param in held]
        if later is None or all(param.grad is not None for param in params):
            return reduce(*args)
        first = [param.grad for param in params]  # of this pass alone: others come between

        def second() -> None:
            for param, grad in zip(params, first, strict=True):
                param.grad = param.grad if grad is None else grad
            first.clear()
            with _set(group, "reshard_after_backward", False):  # gathered since, for another pass
                reduce()

        for param in params:
            param.grad = None
        with _set(group, "reduce_grads", False):
            reduce(*args)
        later.add(second)
        later.last = finish
        return None

    return call


@contextmanager
def _set(group: Any, name: str, value: bool) -> Iterator[None]:
    outer = getattr(group, name)
    setattr(group, name, value)
    yield
    setattr(group, name, outer)


def name_gathers(model: nn.Module) -> None:
    """Book what FSDP allocates around a gather as `gathered`, full gradients and their reduction as
    `gathered_grads`."""
    for group in param_groups(model):
        group.unshard = _within("gathered", group.unshard)
        group.post_backward = _within("gathered_grads", group.post_backward)
        group.wait_for_unshard = _and_book_gradients(group, _within("gathered", group.wait_for_unshard))


def _within(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with category(name):
            return method(*args, **kwargs)

    return call


def _and_book_gradients(group: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """After the first gather the full parameters exist: book their gradients as soon as autograd
    accumulates them."""
    hooked = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal hooked
        result = method(*args, **kwargs)
        if not hooked and all(hasattr(param, "_unsharded_param") for param in group.fsdp_params):
            hooked = True
            for param in group.fsdp_params:
                param._unsharded_param.register_post_accumulate_grad_hook(_book_full)
        return result

    return call


def _book_full(parameter: Tensor) -> None:
    if parameter.grad is not None:
        recategorize(parameter.grad, "gathered_grads")
