"""Streams without a device: what runs beside what, and whether anything uses memory without having waited.

Every stream, every collective (gloo's do not run in order) and the host are actors with a vector clock; waits
join clocks. Two accesses to the same bytes, one of them a write, by actors of which neither waited for the
other, are a race: they may run in either order, so this is stricter than to run side streams as late (or as
early) as the waits allow. A new tensor counts as written by who allocates it, as its memory was another's;
what is freed is its stream's to use again, so that this must have waited for all others, but for those that
the allocator was told of (`record_stream`: copies, `Platform.keep`, collectives).
"""

import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.distributed import collectives
from mopexec.distributed.tiers import Platform
from mopexec.measure.scope import NOW
from mopexec.measure.torch_dispatch import EagerMode, plain_types, returns_alias, tensors_in, writes

Clock = dict[str, int]
Site = tuple[str, int]
MAIN, HOST = "compute", "host"


class Race(AssertionError):  # noqa: N818
    """Two actors use the same bytes and neither waited for the other."""


class Order(EagerMode):
    """Checks while entered. sites: where the program waited; skip: a site that does not."""

    def __init__(self, skip: Site | None = None) -> None:
        super().__init__()
        self.clocks: dict[str, Clock] = {}
        self.actor, self.skip, self.collective = MAIN, skip, "collective 0"
        self.sites: dict[Site, None] = {}
        self._used: dict[int, tuple[Any, dict[tuple[int, int, str, bool], int]]] = {}
        self._told: dict[int, set[str]] = {}
        self._freed: list[str] = []

    def clock(self, actor: str) -> Clock:
        return self.clocks.setdefault(actor, {})

    def join(self, actor: str, other: Clock) -> None:
        mine = self.clock(actor)
        for name, time in other.items():
            mine[name] = max(mine.get(name, 0), time)

    def waits(self, actor: str, event: Clock | None, depth: int = 2) -> None:
        """`actor` waits for an event, unless the caller's line is the one that is skipped."""
        if event is None:
            return
        frame = sys._getframe(depth)
        site = (frame.f_code.co_filename.rsplit("/mopexec/", 1)[-1], frame.f_lineno)
        self.sites[site] = None
        if site != self.skip:
            self.join(actor, event)

    def start(self, actor: str) -> None:
        """An op of `actor` begins: after what the host has done; a collective after this stream too."""
        if actor == self.collective:
            self.join(actor, self.clock(self.actor))
        if actor != HOST:
            self.join(actor, self.clock(HOST))
        self.clock(actor)[actor] = self.clock(actor).get(actor, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if not plain_types(types):
            return NotImplemented
        if self._freed:
            raise Race(self._freed.pop())
        kwargs = kwargs or {}
        actor = HOST if NOW.host_compute else self.actor
        if func.namespace == "c10d":
            actor = self.collective
        self.start(actor)
        if writes(func) or not returns_alias(func):
            for written, value in _bound(func, args, kwargs):
                for tensor in tensors_in(value):
                    self.use(tensor, actor, write=written, what=func)
        result = func(*args, **kwargs)
        if not returns_alias(func) and func.namespace != "c10d":
            for tensor in tensors_in(result):
                self.use(tensor, actor, write=True, what=func)
        return result

    def use(self, tensor: Tensor, actor: str, *, write: bool, what: Any) -> None:
        """Raises Race where another uses the same bytes, one of the two writes, and `actor` did not wait."""
        storage = tensor.untyped_storage()
        if not tensor.numel():
            return
        key = storage._cdata
        if key not in self._used or self._used[key][0]() is not storage:
            accesses: dict[tuple[int, int, str, bool], int] = {}
            told, shape = self._told.setdefault(key, set()), tuple(tensor.shape)
            told.clear()
            self._used[key] = (
                weakref.ref(storage, lambda _: self._free(actor, accesses, told, shape)), accesses
            )  # fmt: skip
        size, low = tensor.element_size(), tensor.storage_offset()
        last = low + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        low, high = low * size, (last + 1) * size
        clock, known = self.clock(actor), self._used[key][1]
        for (start, stop, other, wrote), time in known.items():
            shared = other != actor and start < high and low < stop and (write or wrote)
            if shared and clock.get(other, 0) < time:
                kind = "writes" if write else "reads"
                raise Race(f"{what} on {actor} {kind} what {other} uses ({tuple(tensor.shape)})")
        known[low, high, actor, write] = clock[actor]

    def told(self, tensor: Tensor, actor: str) -> None:
        """The allocator is told that `actor` uses the tensor."""
        self._told.setdefault(tensor.untyped_storage()._cdata, set()).add(actor)

    def _free(self, owner: str, accesses: Any, told: set[str], shape: tuple[int, ...]) -> None:
        """Memory goes back to `owner`."""
        for (_, _, other, _), time in accesses.items():
            apart = other not in (owner, HOST, *told) and not other.startswith("collective")
            if apart and self.clock(owner).get(other, 0) < time:
                self._freed.append(f"{owner} frees what {other} uses {shape}")


@cache
def _arguments(func: Any) -> list[tuple[str, bool]]:
    """Names of an op's arguments, and whether it writes to them."""
    found = []
    for argument in func._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        found.append((argument.name, written or (func.namespace == "c10d" and "input" not in argument.name)))
    return found


def _bound(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[bool, Any]]:
    """Whether an op writes to an argument, and the argument."""
    for index, (name, written) in enumerate(_arguments(func)):
        if index < len(args):
            yield written, args[index]
        elif name in kwargs:
            yield written, kwargs[name]


class OrderedPlatform(Platform):
    """The seam of streams over an `Order`: work runs at once, and is held to what was waited for."""

    def __init__(self, order: Order) -> None:
        super().__init__(torch.device("cpu"))
        self.order = order

    @property
    def backend(self) -> str:
        return "fake"

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        outer, self.order.actor = self.order.actor, name
        try:
            yield
        finally:
            self.order.actor = outer

    def copy(self, dst: Tensor, src: Tensor, stream: str | None = None) -> None:
        with self.stream(stream or self.order.actor):
            dst.copy_(src)
        if stream:
            for tensor in (dst, src):
                self.order.told(tensor, stream)

    def keep(self, tensor: Tensor, stream: str) -> None:
        self.order.told(tensor, stream)

    def record(self, stream: str | None = None) -> Any:
        self.order.join(stream or self.order.actor, self.order.clock(HOST))
        return dict(self.order.clock(stream or self.order.actor))

    def wait(self, event: Any, stream: str | None = None) -> None:
        self.order.waits(stream or self.order.actor, event)

    def wait_host(self, event: Any) -> None:
        self.order.waits(HOST, event)

    def synchronize(self) -> None:
        for clock in list(self.order.clocks.values()):
            self.order.join(HOST, clock)


class _Work:
    def __init__(self, order: Order) -> None:
        self._order, self._event = order, dict(order.clock(order.collective))

    def wait(self) -> None:
        self._order.waits(self._order.actor, self._event)


@contextmanager
def watched(order: Order) -> Iterator[OrderedPlatform]:
    """A platform whose streams and collectives are checked."""
    numbers = itertools.count(1)

    def issue(kind: str, size: int, run: Any, group: Any) -> Any:
        order.collective = f"collective {next(numbers)}"
        if run() is not None:
            return _Work(order)
        order.join(order.actor, order.clock(order.collective))
        return None

    def point_to_point(ops: list[dist.P2POp]) -> list[Any]:
        """Not seen by a dispatch mode; of a fake group nothing arrives anyway."""
        order.start(order.collective)
        for op in ops:
            order.use(op.tensor, order.collective, write=op.op is dist.irecv, what="send or receive")
        return []

    outer, batch = collectives.observe(issue), dist.batch_isend_irecv
    dist.batch_isend_irecv = point_to_point
    try:
        with order:
            yield OrderedPlatform(order)
    finally:
        collectives.observe(outer)
        dist.batch_isend_irecv = batch
