"""The seam between a CUDA device and a CPU: device and host tiers, streams, copies between the tiers.

On a CPU both tiers are ordinary memory, so the tier is a mark on the storage: host tensors come from
`host_empty`, and the memory tracker raises when anything but a copy or the host optimizer reads one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mopexec.measure.scope import host_allocation
from mopexec.measure.tracker import mark_host, uncounted


class Platform:
    """The device of this rank. fake: tensors hold no data (a dry run), so nothing may read their values."""

    def __init__(self, device: torch.device, *, fake: bool = False) -> None:
        self.device = device
        self.fake = fake
        self._streams: dict[str, Any] = {}
        self._fetched: dict[Any, Tensor] = {}

    @classmethod
    def detect(cls) -> "Platform":
        """This rank's CUDA device (LOCAL_RANK) if there is one, else the CPU."""
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            found = cls(device)
            found.begin_thread()
            return found
        return cls(torch.device("cpu"))

    def begin_thread(self) -> None:
        """Make this rank's device the calling thread's current one: each thread has its own, at first 0."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """The backend of torch.distributed: nccl with gloo for host tensors, gloo, or fake."""
        if self.fake:
            return "fake"
        return "cpu:gloo,cuda:nccl" if self.is_cuda else "gloo"

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype, category: str) -> Tensor:
        """An uninitialised host tensor, pinned on CUDA, marked as host tier."""
        with host_allocation(category):
            device = self.device if self.fake else "cpu"
            tensor = torch.empty(tuple(shape), dtype=dtype, device=device, pin_memory=self.is_cuda)
        return mark_host(tensor, category)

    @contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """Tensors made inside are tables of the process (a mesh's ranks): not counted, real in a dry run."""
        with uncounted(), unset_fake_temporarily():
            yield

    def stream(self, name: str) -> AbstractContextManager[Any]:
        """Work inside is issued on the stream `name`, made at its first use and kept. Nothing on a CPU."""
        return torch.cuda.stream(self._stream(name)) if self.is_cuda else nullcontext()

    def copy(self, dst: Tensor, src: Tensor, stream: str | None = None) -> None:
        """dst = src, between tiers or within one: asynchronous on CUDA, on `stream` (current if None).

        The caller orders it with `record` and `wait`; device tensors are kept until the stream is done.
        """
        if not self.is_cuda:
            dst.copy_(src)
            return
        with self.stream(stream) if stream else nullcontext():
            dst.copy_(src, non_blocking=True)
            if stream:
                for tensor in (dst, src):
                    if tensor.is_cuda:
                        tensor.record_stream(self._stream(stream))

    def store(self, *pairs: tuple[Tensor, Tensor], stream: str = "d2h") -> Any:
        """Copy (host, device) pairs to the host beside what follows; returns the event of their arrival."""
        self.wait(self.record(), stream)
        for host, tensor in pairs:
            self.copy(host, tensor, stream)
        return self.record(stream)

    def keep(self, tensor: Tensor, stream: str) -> None:
        """`tensor` may be dropped before `stream` is done with it."""
        if tensor.is_cuda:
            tensor.record_stream(self._stream(stream))

    def record(self, stream: str | None = None) -> Any:
        """An event after the work issued so far on `stream` (the current one if None); None on a CPU."""
        if not self.is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream(stream) if stream else torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Any, stream: str | None = None) -> None:
        """Work issued on `stream` (the current one if None) from now on runs after `event` (may be None)."""
        if event is not None:
            (self._stream(stream) if stream else torch.cuda.current_stream(self.device)).wait_event(event)

    def fetch(self, tensor: Tensor) -> list[Any]:
        """The values of a device tensor, as nested lists: the host waits for the device, by a pinned copy."""
        if not self.is_cuda:
            values: list[Any] = tensor.tolist()
            return values
        key = (tensor.shape, tensor.dtype)
        if key not in self._fetched:
            self._fetched[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host = self._fetched[key].copy_(tensor, non_blocking=True)
        self.wait_host(self.record())
        values = host.tolist()
        return values  # noqa: RET504 (typed)

    def upload(self, values: Sequence[object], shape: tuple[int, ...]) -> Tensor:
        """Integers of the host, nested as `shape`, on the device (int64): a pinned copy, nobody waits."""
        tensor = torch.empty(shape, dtype=torch.int64, device=self.device)
        with uncounted():
            host = torch.tensor(values, dtype=torch.int64, pin_memory=self.is_cuda)
        return tensor.copy_(host, non_blocking=True)

    def wait_host(self, event: Any) -> None:
        """Block the host until `event` has happened."""
        if event is not None:
            event.synchronize()

    def settle(self) -> None:
        """Block the host until the current stream is idle; what other streams do beside it goes on."""
        self.wait_host(self.record())

    def synchronize(self) -> None:
        """Block until the device is idle, all of its streams."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _stream(self, name: str) -> Any:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._streams[name]
