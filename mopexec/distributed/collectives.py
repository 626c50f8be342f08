"""Every collective of the executor goes through here: one shim for torch's names, one seam for the timers.

torch 2.13 renames `all_gather_into_tensor` and `reduce_scatter_tensor` to `*_single` and warns on the old
names; torch 2.11 and 2.12 know the old names only. The first dimension is what is split over the group.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack

from mopexec.measure.tracker import active_tracker, is_host

Group = dist.ProcessGroup | None


class Waitable(Protocol):
    """What an asynchronous collective returns."""

    def wait(self) -> Any: ...


Issue = Callable[..., Any]
Observer = Callable[[str, int, Callable[[], Any], Group], Any]

_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)
_observer: Observer | None = None


class _Done:
    """The work of a collective that needed none."""

    def wait(self) -> None:
        return None


class _Works:
    """Several works waited for as one."""

    def __init__(self, works: Sequence[Waitable]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def observe(observer: Observer | None) -> Observer | None:
    """Install `observer(kind, bytes, issue, group)`, which runs `issue()`; returns the one it replaces."""
    global _observer
    previous, _observer = _observer, observer
    return previous


def all_gather_single(output: Tensor, input: Tensor, group: Group = None, async_op: bool = False) -> Waitable:
    """output [n * s, ...] = the group's inputs [s, ...] in rank order. The work is done unless async."""
    return _run(
        "all_gather",
        output.nbytes,
        (output, input),
        lambda output, input: _all_gather(output, input, group=group, async_op=async_op),
        group,
    )


def reduce_scatter_single(
    output: Tensor, input: Tensor, group: Group = None, async_op: bool = False
) -> Waitable:
    """output [s, ...] = this rank's slice of the sum over the group of inputs [n * s, ...]."""
    return _run(
        "reduce_scatter",
        input.nbytes,
        (output, input),
        lambda output, input: _reduce_scatter(output, input, group=group, async_op=async_op),
        group,
    )


def all_reduce(
    tensor: Tensor, group: Group = None, async_op: bool = False, op: Any = dist.ReduceOp.SUM
) -> Waitable:
    """tensor = the sum (or `op`) over the group, in place."""
    return _run(
        "all_reduce",
        tensor.nbytes,
        (tensor,),
        lambda tensor: dist.all_reduce(tensor, op=op, group=group, async_op=async_op),
        group,
    )


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
) -> Waitable:
    """Row blocks of `input` go to the ranks in order; `output` gathers theirs. Splits in rows."""
    return _run(
        "all_to_all",
        input.nbytes,
        (output, input),
        lambda output, input: dist.all_to_all_single(
            output, input, output_splits, input_splits, group=group, async_op=async_op
        ),
        group,
    )


def send_recv(
    send: Sequence[Tensor],
    to: int,
    receive: Sequence[Tensor],
    source: int,
    group: Group = None,
    async_op: bool = False,
    timed: bool = True,
) -> Waitable:
    """Send tensors to global rank `to`, fill `receive` from global rank `source`, batched (a ring's hop).

    timed: see `exchange`.
    """
    there, here = [(tensor, to, 0) for tensor in send], [(tensor, source, 0) for tensor in receive]
    return exchange(there, here, group, async_op, timed)


def exchange(
    send: Sequence[tuple[Tensor, int, int]],
    receive: Sequence[tuple[Tensor, int, int]],
    group: Group = None,
    async_op: bool = False,
    timed: bool = True,
) -> Waitable:
    """Point to point, batched: (tensor, global rank of the peer, tag) of each. A pair's tensors with equal
    tags match in order.

    timed: False where the group's ranks do not come here together (stages of a pipeline, experts that move):
    a timer that lines them up would wait for ever.
    """
    if not send and not receive:
        return _Done()

    def issue(*tensors: Tensor) -> Any:
        there, here = tensors[: len(send)], tensors[len(send) :]
        ops = [
            dist.P2POp(dist.isend, tensor, peer, group, tag)
            for tensor, (_, peer, tag) in zip(there, send, strict=True)
        ]
        ops += [
            dist.P2POp(dist.irecv, tensor, peer, group, tag)
            for tensor, (_, peer, tag) in zip(here, receive, strict=True)
        ]
        works = _Works(cast(Sequence[Waitable], dist.batch_isend_irecv(ops)))
        return works if async_op else works.wait()

    kind = "send_recv" if timed else ""
    tensors = [tensor for tensor, _, _ in (*send, *receive)]
    return _run(kind, sum(tensor.nbytes for tensor, _, _ in send), tensors, issue, group)


def broadcast(tensor: Tensor, source: int, group: Group = None) -> None:
    """tensor = global rank `source`'s, in place (start-up only: not a kind of work)."""
    dist.broadcast(tensor, src=source, group=group)


def _run(kind: str, num_bytes: int, tensors: Sequence[Tensor], issue: Issue, group: Group) -> Waitable:
    """issue: begins the collective on `tensors`, or on others of the same memory."""
    settled = None
    if active_tracker() is not None and tensors[0].device.type == "cpu":
        given = [_double(tensor) for tensor in tensors]
        settled, tensors = _Settled(tensors, given), given
        del given
    begin = functools.partial(issue, *tensors)
    del tensors
    work = begin() if _observer is None or not kind else _observer(kind, num_bytes, begin, group)
    del begin
    if settled is None:
        return cast(Waitable, work) if work is not None else _Done()
    settled.work = work
    if work is None:
        settled.wait()
    return settled


_OWN = 3
"""References to an object of a list that only a loop over it has in hand, its own and the count's among them.
A thread that gives a storage up lowers its use count first, and the reference to its Python object once it
has the GIL."""


class _Settled:
    """A work that is over when gloo has let go of its tensors too.

    gloo's thread keeps them, or views of them, for some time after the work is done, so that what is freed
    right after `wait` may or may not count at the next allocation. A tracked run waits for that: its memory
    is to be exact. gloo is given doubles, which nobody else holds: views taken elsewhere do not count.
    """

    def __init__(self, tensors: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        self._tensors = tensors
        pairs = zip(tensors, given, strict=True)
        self._doubles = [double.untyped_storage() for tensor, double in pairs if double is not tensor]
        self.work: Waitable | None = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None
        while any(_use_count(one) > 1 or sys.getrefcount(one) > _OWN for one in self._doubles):
            time.sleep(0)  # gloo's thread goes first
        self._doubles, self._tensors = [], []


def _double(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own, which keeps the tensor's alive; the tensor itself where it has
    no memory here, or is not to be read (on the host)."""
    if isinstance(tensor, FakeTensor) or is_host(tensor):
        return tensor
    return from_dlpack(tensor.detach())


def _use_count(storage: torch.UntypedStorage) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def of_all(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, pickled, by rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def parts_of_all(about: Any, parts: Sequence[Tensor]) -> list[tuple[Any, Sequence[Tensor]]]:
    """What every rank of the world says about its parts, and these: flat tensors of one dtype, on the CPU.

    For tests and export. One tensor of a rank travels: torch reads each from a pickle by itself, slowly.
    """
    assert len({part.dtype for part in parts}) < 2, "parts of several dtypes"
    flat = torch.cat([part.flatten() for part in parts]).cpu() if parts else torch.empty(0)
    everyone = of_all((about, [part.numel() for part in parts], flat))
    return [(told, flat.split(sizes)) for told, sizes, flat in everyone]
