"""KindTimer: seconds, FLOP and bytes per kind of work (`mopsim.spec.hardware.WORK_KINDS`) of profiled steps.

A dispatch mode times each op around its kernel alone, so the step's own Python is in no kind. Before a
collective the ranks of its group line up, untimed: its seconds are the transfer's, not the wait for a slower
peer, which the step shows but no kind of work causes. It is then waited for at once, so that a profiled step
measures each kind undisturbed by the others and is slower than a normal one. On a GPU each op is issued while
its stream still spins, so that its events do not count the host's time to launch it; what an op launches
after the spin may count some. Enter the timer outside a MemoryTracker (or without one), so that the
tracker's work is not timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from mopexec.distributed import collectives
from mopexec.measure.scope import NOW
from mopexec.measure.torch_dispatch import EagerMode, plain_types, returns_alias, tensors_in, writes
from mopexec.measure.tracker import is_host
from mopsim.spec.plan import KindTiming

MATMULS = frozenset(("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm"))
ATTENTION = frozenset((
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
))  # fmt: skip
ATTENTION_BACKWARD = frozenset(name.removesuffix("_forward") + "_backward" for name in ATTENTION)
COLLECTIVE_OPS = {
    "_allgather_base_": "all_gather", "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter", "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce", "alltoall_base_": "all_to_all", "alltoall_": "all_to_all",
}  # fmt: skip
_COPIES = frozenset(("copy_", "_to_copy", "_foreach_copy_"))
_METADATA = frozenset((
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh",
))  # fmt: skip
_SPIN = 2**18
"""Cycles of a GPU, 0.1 to 0.2 ms: longer than the host takes to launch what one op launches."""


@dataclass
class _Sum:
    """One kind in one step."""

    count: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


class KindTimer(EagerMode):
    """`with timer: runner.step(batches)` per profiled step, then `timer.kinds()`. cuda: time by events.

    On a CPU whose ops run on this thread alone, its own CPU clock times them, as the probe does: a neighbour
    that takes the core does not count.
    """

    def __init__(self, cuda: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._cuda = cuda
        self._steps: list[dict[str, _Sum]] = []
        self._pending: list[tuple[_Sum, Any, Any]] = []
        self._inside = False
        self._outer: collectives.Observer | None = None

    def kinds(self) -> dict[str, KindTiming]:
        """Per kind, over the steps so far: seconds (median, low, high); count, FLOP and bytes of the last.

        Of three steps or more the first is left out: the timer's own paths are cold in it.
        """
        steps = self._steps[1:] if len(self._steps) > 2 else self._steps
        names = dict.fromkeys(name for step in steps for name in step)
        return {name: _timing([step.get(name, _Sum()) for step in steps]) for name in names}

    def __enter__(self) -> "KindTimer":
        self._steps.append({})
        self._outer = collectives.observe(self._collective)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        collectives.observe(self._outer)
        if self._pending:
            torch.cuda.synchronize()
        for entry, start, end in self._pending:
            entry.seconds += start.elapsed_time(end) * 1e-3
        self._pending.clear()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if not plain_types(types):
            return NotImplemented
        kwargs = kwargs or {}
        kind = None if self._inside else _kind(func, args)
        if kind is None:
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            num_bytes = sum(tensor.nbytes for tensor in tensors_in(args[:2]))
            self._line_up(_group_of(args))
            return self._timed(
                kind,
                lambda: _finished(func(*args, **kwargs)),
                lambda result: (0.0, num_bytes),
                time.perf_counter,
            )
        return self._timed(
            kind,
            lambda: func(*args, **kwargs),
            lambda result: _work(kind, func, args, kwargs, result),
            self._clock,
        )

    def _line_up(self, group: collectives.Group) -> None:
        """Wait until every rank of a group is about to start its collective."""
        self._inside = True
        try:
            if dist.get_world_size(group) > 1:
                dist.barrier(group)
        finally:
            self._inside = False

    def _timed(
        self,
        kind: str,
        run: Callable[[], Any],
        work: Callable[[Any], tuple[float, float]],
        clock: Callable[[], float],
    ) -> Any:
        entry = self._steps[-1].setdefault(kind, _Sum())
        self._inside = True
        try:
            if self._cuda and kind != "host_optimizer":
                torch.cuda._sleep(_SPIN)  # type: ignore[no-untyped-call]
                start = _event()
                result = run()
                end = _event()
                self._pending.append((entry, start, end))
            else:
                begin = clock()
                result = run()
                entry.seconds += clock() - begin
        finally:
            self._inside = False
        flops, num_bytes = work(result)
        entry.count += 1
        entry.flops += flops
        entry.bytes += num_bytes
        return result

    def _collective(
        self, kind: str, num_bytes: int, issue: collectives.Issue, group: collectives.Group
    ) -> Any:
        def run() -> None:
            work = issue()
            if work is not None:
                work.wait()

        self._line_up(group)
        return self._timed(kind, run, lambda result: (0.0, float(num_bytes)), time.perf_counter)


def _kind(func: Any, args: Any) -> str | None:
    """The kind of work of an op, or None if it moves no data."""
    name = _NAMES.get(func)
    if name is None:
        name = _NAMES[func] = func._schema.name.split("::")[1]
    if func.namespace == "c10d":
        return COLLECTIVE_OPS.get(name)
    if name in _METADATA or (returns_alias(func) and not writes(func)):
        return None
    if NOW.host_compute:
        return "host_optimizer"
    if name.removesuffix("_") in MATMULS:
        return "grouped_matmul" if NOW.component == "experts" or name == "_grouped_mm" else "matmul"
    if name in ATTENTION or name in ATTENTION_BACKWARD:
        return "attention"
    if name in _COPIES:
        return _copy_kind(name, args)
    if name.startswith("_fused_adam") or (name.startswith("_foreach_") and NOW.component == "optimizer"):
        return "optimizer"
    return "memory_bound"


_NAMES: dict[Any, str] = {}


def _copy_kind(name: str, args: Any) -> str:
    """h2d or d2h where `copy_(dst, src)` changes the tier, else memory_bound."""
    destination, source = next(tensors_in(args[0])), next(tensors_in(args[1])) if len(args) > 1 else None
    if name == "_to_copy" or source is None or destination.is_meta:
        return "memory_bound"
    to_host, from_host = _on_host(destination), _on_host(source)
    return "memory_bound" if to_host == from_host else "d2h" if to_host else "h2d"


def _on_host(tensor: Tensor) -> bool:
    return is_host(tensor) or (torch.cuda.is_available() and not tensor.is_cuda)


def _work(kind: str, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[float, float]:
    """FLOP and bytes of an op, from the shapes of its arguments and results."""
    if kind in ("h2d", "d2h"):
        return 0.0, float(sum(tensor.nbytes for tensor in tensors_in(args[0])))
    num_bytes = sum(tensor.nbytes for tensor in tensors_in(args))
    if not writes(func):
        num_bytes += sum(tensor.nbytes for tensor in tensors_in(result))
    return op_flops(func, args, kwargs, result), float(num_bytes)


def op_flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """FLOP of a matmul or an attention op; 0 for others.

    Attention is 2 products of s x s x head_dim forward and 5 backward (scores again, dV, dP, dQ, dK), half of
    each where it is causal (torch's flop counter misses the CPU op and counts causal in full).
    """
    name = func._schema.name.split("::")[1].removesuffix("_")
    if name.startswith("_flash_attention_"):
        return _windowed_flops(func, args, kwargs)
    if name == "_grouped_mm":
        a, b = args[0], args[1]
        return 2.0 * float(a.numel() * b.shape[-1])
    if name in ATTENTION or name in ATTENTION_BACKWARD:
        backward = name in ATTENTION_BACKWARD
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        causal = bool(_given(func, args, kwargs).get("is_causal", False))
        products = (5 if backward else 2) * (0.5 if causal else 1.0)
        return products * 2.0 * float(query.numel() * key.shape[-2])
    formula = flop_registry.get(getattr(torch.ops.aten, name)) if name in MATMULS else None
    return float(formula(*args, **kwargs, out_val=result)) if formula else 0.0


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """What an op is called with, by the names of its schema."""
    names = (argument.name for argument in func._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _windowed_flops(func: Any, args: Any, kwargs: Any) -> float:
    """FLOP of the op that takes [.., heads, head_dim]: every query's window counts whole, documents as the
    longest.
    """
    given = _given(func, args, kwargs)
    left, keys = given.get("window_size_left"), float(given["max_k"])
    keys = min(left + 1.0, keys) if left is not None else keys / (2 if given["is_causal"] else 1)
    return (5 if "grad_out" in given else 2) * 2.0 * float(given["query"].numel()) * keys


def _finished(result: Any) -> Any:
    """A c10d op's result after its work is done (on CUDA: the current stream waits for it)."""
    work = result[-1] if isinstance(result, (list, tuple)) else result
    if isinstance(work, torch.ScriptObject):
        dist.Work.unbox(work).wait()
    return result


def _group_of(args: Any) -> collectives.Group:
    """The process group among a c10d op's arguments; None is the world's."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    return None


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _timing(sums: Sequence[_Sum]) -> KindTiming:
    seconds = [entry.seconds for entry in sums]
    last = sums[-1]
    return KindTiming(
        count=last.count,
        seconds=statistics.median(seconds),
        seconds_low=min(seconds),
        seconds_high=max(seconds),
        flops=last.flops,
        bytes=last.bytes,
    )
