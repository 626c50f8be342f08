"""MemoryTracker: which bytes are alive on the device and on the host, by category, and where the peak was.

A TorchDispatchMode sees every op below autograd. An op's output whose storage was not known is an allocation
of the innermost `category`; a weak reference notices when the storage dies. Views and in-place ops allocate
nothing. Works alike for CPU, CUDA and fake tensors; wrapper subclasses (DTensor) are passed on, so that their
local ops are seen. Not seen: memory inside a kernel or a collective of gloo, and what is made while no
tracker is entered (`adopt`). While any dispatch mode is active, autograd adds up gradients of a tensor used
twice out of place.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mopexec.measure.scope import NOW, category, component, host_allocation, host_compute, phase, uncounted
from mopexec.measure.shapes import ShapeCache
from mopexec.measure.torch_dispatch import (
    EagerMode,
    device_read,
    plain_tensors,
    plain_types,
    returns_alias,
    tensors_in,
)
from mopsim.common.errors import MopError
from mopsim.common.units import format_bytes

__all__ = [
    "HostRead", "MemoryTracker", "OutOfMemory", "active_tracker", "category", "component", "host_allocation",
    "host_compute", "is_host", "mark_host", "phase", "recategorize", "uncounted",
]  # fmt: skip

CUDA_BLOCK = 512  # bytes: the CUDA caching allocator rounds every block up to this
_HOST_MARK = "mop_host_category"  # attribute of a storage's Python object, which lives as long as the storage
_ALLOCATE, _NOTHING, _RESIZE = 0, 1, 2


class OutOfMemory(MopError):  # noqa: N818
    """An allocation crossed the limit of a tier. stopped_by: the tier, the category and where."""

    def __init__(self, tier: str, wanted: int, in_use: int, limit: int, name: str) -> None:
        self.tier, self.category, self.bytes, self.in_use, self.limit = tier, name, wanted, in_use, limit
        self.component, self.phase = NOW.component, NOW.phase
        self.stopped_by = f"{tier} {name} ({self.component} {self.phase})"
        super().__init__(
            f"{tier} memory: {name} wants {format_bytes(wanted)} ({wanted} B) with {format_bytes(in_use)} "
            f"in use, over the limit of {format_bytes(limit)} ({limit} B), in {self.component} {self.phase}"
        )


class HostRead(AssertionError):  # noqa: N818
    """An op on the device read a host tensor without a copy: on CUDA it would fault or crawl."""


class _Entry(weakref.ref[torch.UntypedStorage]):
    """One live storage: a weak reference that carries what it holds."""

    __slots__ = ("bytes", "category", "host", "key")
    key: int
    bytes: int
    category: str
    host: bool


class _Ledger:
    """Bytes alive in one tier, by category, and the state at their largest sum."""

    def __init__(self) -> None:
        self.bytes = 0
        self.by_category: dict[str, int] = {}
        self.limit: int | None = None
        self.reset_peak()

    def reset_peak(self) -> None:
        self.peak = self.bytes
        self.peak_by_category = dict(self.by_category)
        self.peak_component, self.peak_phase = NOW.component, NOW.phase

    def add(self, name: str, num_bytes: int) -> None:
        """num_bytes may be negative. Does not raise: see MemoryTracker._check."""
        self.by_category[name] = self.by_category.get(name, 0) + num_bytes
        self.bytes += num_bytes
        if self.bytes > self.peak:
            self.peak = self.bytes
            self.peak_by_category = self.by_category.copy()
            self.peak_component, self.peak_phase = NOW.component, NOW.phase


class MemoryTracker(EagerMode):
    """Tracks memory while entered; entered again (around build, then around each step) it goes on counting.

    device_limit, host_limit: bytes; the allocation that crosses one raises OutOfMemory. refuse: called
    with each new tensor, may raise.
    meta: meta tensors stand for memory (a dry run), and a ShapeCache runs the ops; otherwise they are shape
    propagation and nothing. device: what holds the device tier (None: a GPU where this machine has one);
    beside a GPU every CPU tensor is on the host.
    """

    def __init__(
        self,
        device_limit: int | None = None,
        host_limit: int | None = None,
        *,
        refuse: Callable[[Any, Tensor], None] | None = None,
        meta: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, _Entry] = {}
        self._device, self._host = _Ledger(), _Ledger()
        self._device.limit, self._host.limit = device_limit, host_limit
        self._num_host = 0
        self._refuse, self._meta = refuse, meta
        self._on_gpu = device.type == "cuda" if device else torch.cuda.is_available()
        self._shapes = ShapeCache() if meta else None
        self.num_ops = 0
        self._outer: list[tuple[MemoryTracker | None, Any]] = []

    @property
    def memory(self) -> int:
        """Device bytes alive now."""
        return self._device.bytes

    @property
    def current_by_category(self) -> dict[str, int]:
        """Device bytes alive now, by category."""
        return _positive(self._device.by_category)

    @property
    def peak_memory(self) -> int:
        """Largest sum of device bytes alive."""
        return self._device.peak

    @property
    def memory_by_category(self) -> dict[str, int]:
        """Device bytes by category at the peak; their sum is `peak_memory`."""
        return _positive(self._device.peak_by_category)

    @property
    def host_memory(self) -> int:
        """Largest sum of host bytes alive."""
        return self._host.peak

    @property
    def host_by_category(self) -> dict[str, int]:
        """Host bytes by category at the host's peak."""
        return _positive(self._host.peak_by_category)

    @property
    def peak_component(self) -> str:
        return self._device.peak_component

    @property
    def peak_phase(self) -> str:
        return self._device.peak_phase

    def reset_peak(self) -> None:
        """Forget the peaks so far: they restart from what is alive now."""
        self._device.reset_peak()
        self._host.reset_peak()

    def adopt(self, tensor: Tensor, name: str) -> None:
        """Count a tensor made before the tracker was entered. A known storage changes its category."""
        for local in plain_tensors(tensor):
            storage = local.untyped_storage()
            entry = self._live.get(storage._cdata)
            if entry is not None:
                self._move(entry, name, entry.host)
            else:
                host = storage.__dict__.get(_HOST_MARK) is not None
                self._add(storage, local.is_cuda, name, host or (self._on_gpu and not local.is_cuda))

    def __enter__(self) -> "MemoryTracker":
        global _active
        self._outer.append((_active, torch.UntypedStorage.resize_))
        _active = self
        torch.UntypedStorage.resize_ = _resize_seen(self, torch.UntypedStorage.resize_)  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        global _active
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active, torch.UntypedStorage.resize_ = self._outer.pop()  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if not plain_types(types):
            return NotImplemented
        if NOW.uncounted:
            return func(*args, **(kwargs or {}))
        self.num_ops += 1
        device = device_read(func, args)
        if device is not None:
            return device
        effect = _EFFECTS.get(func)
        if effect is None:
            effect = _EFFECTS[func] = _effect(func)
        if self._num_host and not NOW.host_compute and func not in _HOST_SAFE:
            self._check_host_read(func, args, kwargs)
        if self._shapes is not None:
            result = self._shapes(func, args, kwargs)
        else:
            result = func(*args, **kwargs) if kwargs else func(*args)
        if effect != _NOTHING:
            if isinstance(result, Tensor):
                self._see(func, result)
            else:
                for tensor in tensors_in(result):
                    self._see(func, tensor)
        return result

    def _see(self, func: Any, tensor: Tensor) -> None:
        """Count an op's output if its storage is new or changed its size."""
        if tensor.is_meta and not self._meta:
            return
        storage = tensor.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is None:
            if self._refuse is not None:
                self._refuse(func, tensor)
            is_cuda = tensor.is_cuda
            host = not is_cuda and (self._on_gpu or NOW.tier == "host")
            self._add(storage, is_cuda, NOW.category, host)
        elif _EFFECTS[func] == _RESIZE:
            self._resized(entry, storage, tensor.is_cuda)

    def _add(self, storage: torch.UntypedStorage, is_cuda: bool, name: str, host: bool) -> None:
        size = _rounded(storage.nbytes(), is_cuda)
        if size == 0:
            return
        entry = _Entry(storage, self._died)
        entry.key, entry.bytes, entry.category, entry.host = storage._cdata, size, name, host
        self._live[entry.key] = entry
        self._num_host += host
        self._book(host, name, size)

    def _book(self, host: bool, name: str, num_bytes: int) -> None:
        ledger = self._host if host else self._device
        ledger.add(name, num_bytes)
        if ledger.limit is not None and ledger.bytes > ledger.limit and num_bytes > 0:
            tier = "host" if host else "device"
            raise OutOfMemory(tier, num_bytes, ledger.bytes - num_bytes, ledger.limit, name)

    def _died(self, entry: Any) -> None:
        assert isinstance(entry, _Entry)
        if self._live.get(entry.key) is entry:
            del self._live[entry.key]
            self._num_host -= entry.host
            self._book(entry.host, entry.category, -entry.bytes)

    def _resized(self, entry: _Entry, storage: torch.UntypedStorage, is_cuda: bool) -> None:
        size = _rounded(storage.nbytes(), is_cuda)
        change, entry.bytes = size - entry.bytes, size
        if change:
            self._book(entry.host, entry.category, change)

    def _move(self, entry: _Entry, name: str, host: bool) -> None:
        if (entry.category, entry.host) == (name, host):
            return
        self._book(entry.host, entry.category, -entry.bytes)
        self._num_host += host - entry.host
        entry.category, entry.host = name, host
        self._book(host, name, entry.bytes)

    def _check_host_read(self, func: Any, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                self._refuse_host(func, value)
            elif isinstance(value, (list, tuple)):
                for tensor in tensors_in(value):
                    self._refuse_host(func, tensor)

    def _refuse_host(self, func: Any, tensor: Tensor) -> None:
        if tensor.is_meta and not self._meta:
            return
        storage = tensor.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is not None and entry.host and _HOST_MARK in storage.__dict__:
            raise HostRead(
                f"{func} reads a host tensor ({entry.category}, {tuple(tensor.shape)}) in {NOW.component} "
                f"{NOW.phase}: copy it to the device first, or work inside host_compute()"
            )


_active: MemoryTracker | None = None


def active_tracker() -> MemoryTracker | None:
    """The tracker entered last, if any."""
    return _active


def mark_host(tensor: Tensor, name: str) -> Tensor:
    """Declare that `tensor`'s storage lies in the host tier, under category `name`. Returns the tensor."""
    for local in plain_tensors(tensor):
        storage = local.untyped_storage()
        setattr(storage, _HOST_MARK, name)
        if _active is not None:
            entry = _active._live.get(storage._cdata)
            if entry is None:
                _active._add(storage, False, name, True)
            else:
                _active._move(entry, name, True)
    return tensor


def is_host(tensor: Tensor) -> bool:
    """Whether the tensor's storage was marked as host tier."""
    return all(_HOST_MARK in local.untyped_storage().__dict__ for local in plain_tensors(tensor))


def recategorize(tensor: Tensor, name: str) -> Tensor:
    """Move `tensor`'s bytes to category `name` (it keeps its tier). Nothing without an active tracker."""
    if _active is not None:
        _active.adopt(tensor, name)
    return tensor


def _resize_seen(tracker: MemoryTracker, original: Any) -> Any:
    """UntypedStorage.resize_ (how FSDP2 frees and takes back gathered parameters), the tracker informed."""

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        entry = tracker._live.get(storage._cdata)
        is_cuda = storage.device.type == "cuda"
        if entry is not None:
            tracker._resized(entry, storage, is_cuda)
        else:
            tracker._add(storage, is_cuda, NOW.category, NOW.tier == "host" or _HOST_MARK in storage.__dict__)
        return result

    return resize_


def _rounded(num_bytes: int, is_cuda: bool) -> int:
    return -(-num_bytes // CUDA_BLOCK) * CUDA_BLOCK if is_cuda else num_bytes


def _positive(by_category: dict[str, int]) -> dict[str, int]:
    return {name: num_bytes for name, num_bytes in by_category.items() if num_bytes}


def _effect(func: Any) -> int:
    """What an op does to memory, from its schema: returns that alias an argument are views or in-place."""
    name = func._schema.name
    if func.namespace == "prim" or (func.namespace == "aten" and name[6:] in _HOST_SAFE_NAMES):
        _HOST_SAFE.add(func)
    if (
        name in ("aten::resize_", "aten::set_", "aten::lift_fresh", "aten::resize_as_")
        or func._overloadname == "out"
    ):
        return _RESIZE
    if func.namespace in ("c10d", "prim") or returns_alias(func):
        return _NOTHING
    return _ALLOCATE


_EFFECTS: dict[Any, int] = {}  # by op overload, filled as ops are met
_HOST_SAFE: set[Any] = set()
#: Ops that may take a host tensor outside host_compute: copies between tiers, writes, views and metadata.
_HOST_SAFE_NAMES = frozenset(
    ("copy_", "_to_copy", "clone", "zero_", "fill_", "set_", "resize_", "lift_fresh", "pin_memory",
     "_pin_memory", "is_pinned", "record_stream", "detach", "detach_", "alias", "view", "_unsafe_view",
     "slice", "select", "split", "split_with_sizes", "unbind", "as_strided", "expand", "squeeze", "unsqueeze",
     "permute", "transpose", "t", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty",
     "new_zeros", "new_empty_strided")
)  # fmt: skip
