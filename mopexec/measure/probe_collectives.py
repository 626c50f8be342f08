"""The five kinds of collective, timed on a process group (gloo or NCCL), and what they cost compute."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mopexec.measure.probe_compute import overlap_compute
from mopexec.measure.probe_fit import overlap_loss
from mopexec.measure.probe_timing import Sample, Stopwatch, summarize

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
SIZES = {"cpu": (2**14, 2**17, 2**20, 2**22, 2**23), "cuda": (2**16, 2**20, 2**23, 2**26, 2**28)}
"""Bytes of the full buffer."""

Run = Callable[[], Any]


def wire_bytes(kind: str, size: int, ranks: int) -> float:
    """Bytes that one rank sends: CollectiveCurve's rule."""
    share = {"send_recv": 1.0, "all_reduce": 2 * (ranks - 1) / ranks}
    return size * share.get(kind, (ranks - 1) / ranks)


def _call(kind: str, size: int, group: dist.ProcessGroup, device: torch.device) -> Run:
    """A blocking call of one collective, issued asynchronously and waited for, as the executor does."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    numel = max(size // 4 // ranks, 1) * ranks
    full, other = (torch.zeros(numel, device=device) for _ in range(2))
    part = torch.zeros(numel // ranks, device=device)
    if kind == "all_gather":
        return lambda: dist.all_gather_single(full, part, group=group, async_op=True).wait()
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_single(part, full, group=group, async_op=True).wait()
    if kind == "all_reduce":
        return lambda: dist.all_reduce(full, group=group, async_op=True).wait()
    if kind == "all_to_all":
        return lambda: dist.all_to_all_single(other, full, group=group, async_op=True).wait()

    def ring() -> None:
        after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
        ops = [dist.P2POp(dist.isend, full, after, group), dist.P2POp(dist.irecv, other, before, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return ring


def collectives(group: dist.ProcessGroup, device: torch.device, rounds: int) -> dict[tuple[str, int], Sample]:
    """(kind, bytes of the full buffer) -> Sample, on every rank of `group`. All ranks make the same calls."""
    stopwatch = Stopwatch(device)
    cases = {(kind, size): _call(kind, size, group, device) for kind in KINDS for size in SIZES[device.type]}
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for call in cases.values():
        call()
    for _ in range(rounds):
        for (kind, size), call in cases.items():
            seconds[kind, size].append(stopwatch.time(call, 8 if size <= 2**17 else 2))
    return {case: summarize(values) for case, values in seconds.items()}


def communication_share(group: dist.ProcessGroup, device: torch.device, rounds: int) -> tuple[float, float]:
    """(share, spread): compute throughput lost while an all-reduce runs beside matmuls that outlast it."""
    buffer = torch.zeros(2**20 if device.type == "cpu" else 2**26, device=device)
    stopwatch = Stopwatch(device)

    def reduce() -> None:
        dist.all_reduce(buffer, group=group)

    reduce()
    alone = summarize([stopwatch.time(reduce, 1) for _ in range(rounds)]).seconds
    longest = torch.tensor([alone], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    compute, compute_alone = overlap_compute(device, 2 * float(longest))

    def together() -> None:
        work = dist.all_reduce(buffer, group=group, async_op=True)
        compute()
        work.wait()

    losses = []
    for _ in range(rounds):
        dist.barrier(group=group)
        losses.append(overlap_loss(stopwatch.time(together, 1), compute_alone, float(longest)))
    return _middle(losses), max(losses) - min(losses)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
