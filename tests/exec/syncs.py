"""Where the host waits for the device: ops whose result the host needs before it can go on.

On a card each of them ends the run-ahead of the host, and with it what overlaps. `NoHostSyncs` refuses them
on tensors of any device, those without data included, so that a machine without a GPU tells.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopexec.measure.scope import NOW
from mopexec.measure.torch_dispatch import EagerMode, plain_types, tensors_in

_READS = frozenset(
    ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "bincount",
     "unique_dim", "unique_consecutive", "_unique", "_unique2", "histc")
)  # fmt: skip
"""Ops that give a number to the host, or whose result is as long as the values say."""
_COPIES = frozenset(("copy_", "_to_copy", "lift_fresh"))


class HostSync(AssertionError):  # noqa: N818
    """The host would wait for the device here."""


class NoHostSyncs(EagerMode):
    """Refuses while entered, but inside of `host_compute`. device: the planned one's type, as tensors say."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if not plain_types(types):
            return NotImplemented
        kwargs = kwargs or {}
        if not (NOW.host_compute or NOW.uncounted):
            why = self._waits(func, args, kwargs)
            if why:
                raise HostSync(f"{func} in {NOW.component} {NOW.phase}: {why}")
        return func(*args, **kwargs)

    def _waits(self, func: Any, args: Any, kwargs: Any) -> str:
        """Why the host would wait for this op, or ''."""
        name = func._schema.name.removeprefix("aten::")
        if name in _READS:
            return "the host reads a value of the device"
        if (
            name == "repeat_interleave"
            and func._overloadname == "Tensor"
            and kwargs.get("output_size") is None
        ):
            return "the size of the result is a value of the device: give output_size"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            tensor.dtype == torch.bool for tensor in tensors_in(args[1])
        ):
            return "a mask as index asks the device how many there are"
        return self._uploads(name, args, kwargs) if name in _COPIES else ""

    def _uploads(self, name: str, args: Any, kwargs: Any) -> str:
        if name == "lift_fresh":
            return "a tensor is made of numbers of the host"
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device.type if name == "copy_" else kwargs.get("device", source.device)
        goes = torch.device(target or source.device).type
        across = isinstance(source, Tensor) and source.device.type != goes
        asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if not across or (asynchronous and (goes != self.device or source.is_pinned())):
            return ""
        return "a copy between host and device that is not pinned and asynchronous"
