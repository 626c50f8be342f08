"""Fake tensors, fast: an op met before on the same shapes needs no shape function, and a view no bookkeeping.

torch's fake mode keeps shapes too, under all that a tensor can be: looking them up took most of a step on
fake tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from mopexec.measure.shapes import CACHED, IN_PLACE, NOTHING, RUN, UNSAFE_VIEW, how_run, keep, key_of
from mopexec.measure.torch_dispatch import device_read, returns_alias, tensors_in, writes

_VIEW, _MARK, _COLLECTIVE = "view", "mark", "collective"
_OUTSIDE = {"profiler": _MARK, "c10d": _COLLECTIVE}
"""Ops that make no tensors: of marks in a profile, and of process groups."""
_Output = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
_HOW: dict[Any, str] = {}
_OUTPUTS: dict[Any, list[_Output]] = {}


class QuickFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """torch's, which runs ops met for the first time, and what is not of plain fake tensors alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._states: dict[torch.device, dict[str, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as EagerMode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = device_read(func, args)
        if device is not None:
            return device
        kwargs = kwargs or {}
        how = _HOW.get(func)
        if how is None:
            how = _HOW[func] = _how(func)
        if how == _MARK:
            return func(*args, **kwargs)
        if how == RUN or not (_plain(args) and _plain(kwargs.values())):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if how == IN_PLACE:
            return args[0]
        if how == NOTHING:
            return None
        if how == _VIEW:
            return self._view(func, args, kwargs)
        if how == _COLLECTIVE:
            with in_kernel_invocation_manager(self):
                return func(*args, **kwargs)
        if how != CACHED:
            return kwargs[how]
        key = (func, key_of(args), key_of(tuple(kwargs.items())))
        known = _OUTPUTS.get(key)
        if known is None:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self._remember(key, result)
            return result
        made = tuple(self._make(*output) for output in known)
        return made if len(func._schema.returns) > 1 else made[0]

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = args[0].fake_device
        with in_kernel_invocation_manager(self):
            found = func(*args, **kwargs)
        if isinstance(found, Tensor):
            return self._fake(found, device)
        return [self._fake(one, device) for one in found]

    def _remember(self, key: Any, result: Any) -> None:
        found: list[Any] = [result] if isinstance(result, Tensor) else list(result)
        if _plain(found) and all(isinstance(one, Tensor) and _dense(one) for one in found):
            keep(_OUTPUTS, key, [(one.shape, one.stride(), one.dtype, one.fake_device) for one in found])

    def _make(
        self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return self._fake(empty, device)

    def _fake(self, plain: Tensor, device: torch.device) -> Tensor:
        """A fake tensor of one on meta, as torch makes it: what else it has is that of the first on the
        device."""
        known = self._states.get(device)
        if known is None:
            made: Tensor = FakeTensor(self, plain, device)
            self._states[device] = dict(made.__dict__)
            return made
        made = Tensor._make_subclass(
            FakeTensor, plain, plain.requires_grad, dispatch_device=True, device_for_backend_keys=device
        )
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
        made.__dict__.update(known)
        return made


def _how(func: Any) -> str:
    """As of meta tensors; views apart, and ops that change a tensor's shape in place run."""
    if func.namespace in _OUTSIDE:
        return _OUTSIDE[func.namespace]
    if torch.Tag.inplace_view in func.tags:
        return RUN
    if func._schema.name == UNSAFE_VIEW:
        return _VIEW
    how = how_run(func)
    if func.namespace != "aten":
        return how
    first = func._schema.arguments[0] if func._schema.arguments else None
    of_one = first is not None and str(first.type) == "Tensor" and len(func._schema.returns) == 1
    alias = of_one and returns_alias(func) and not writes(func) and func._schema.name not in _LIFTS
    if alias and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSED):
        return _VIEW
    return how


_LIFTS = frozenset(("aten::lift", "aten::lift_fresh"))
"""What makes constants."""
_COMPOSED = "CompositeImplicitAutograd"
"""Of other ops: a view for some arguments only (`to`)."""


def _plain(values: Any) -> bool:
    """Whether all tensors among them are fake and without a value that is known."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) is not FakeTensor or value.constant is not None:
                return False
        elif isinstance(value, (list, tuple)) and not all(
            type(one) is FakeTensor and one.constant is None for one in tensors_in(value)
        ):
            return False
    return True


def _dense(tensor: Tensor) -> bool:
    """Whether it is all of a storage of its own."""
    if tensor.layout != torch.strided or tensor.storage_offset():
        return False
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() == needed
