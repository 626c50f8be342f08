"""The five kinds of collective, timed on a process group (gloo or NCCL), and what they cost compute."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mopexec.distributed import collectives as comm
from mopexec.measure.probe_compute import overlap_compute
from mopexec.measure.probe_fit import overlap_loss
from mopexec.measure.probe_timing import Sample, Stopwatch, summarize

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
SIZES = {"cpu": (2**14, 2**17, 2**20, 2**22), "cuda": (2**16, 2**20, 2**23, 2**26, 2**28)}
"""Bytes of the full buffer."""
OTHER_BYTES = 2**24
"""What compute moves between two collectives of a step, more than a core's own caches hold."""
QUANTILE = 0.25
"""Higher than for compute: of two ranks the later one counts, so the luckiest decile is nobody's step."""

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
        return lambda: comm.all_gather_single(full, part, group, async_op=True).wait()
    if kind == "reduce_scatter":
        return lambda: comm.reduce_scatter_single(part, full, group, async_op=True).wait()
    if kind == "all_reduce":
        return lambda: comm.all_reduce(full, group, async_op=True).wait()
    if kind == "all_to_all":
        return lambda: comm.all_to_all_single(other, full, group=group, async_op=True).wait()
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    return lambda: comm.send_recv([full], after, [other], before, group, async_op=True).wait()


def collectives(group: dist.ProcessGroup, device: torch.device, rounds: int) -> dict[tuple[str, int], Sample]:
    """(kind, bytes of the full buffer) -> Sample, on every rank of `group`. All ranks make the same calls.

    Each call is a lone one, as in a step: the ranks line up first, and on a CPU something else has been
    through the caches since the last call (back to back, the same call takes half as long).
    """
    stopwatch = Stopwatch(device, time.perf_counter)
    cases = {(kind, size): _call(kind, size, group, device) for kind in KINDS for size in SIZES[device.type]}
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for call in cases.values():
        call()
    others = torch.zeros(OTHER_BYTES // 4 if device.type == "cpu" else 0, device=device)
    for _ in range(rounds):
        for (kind, size), call in cases.items():
            others.add_(1.0)
            dist.barrier(group)
            seconds[kind, size].append(stopwatch.time(call, 1))
    return {case: summarize(values, QUANTILE) for case, values in seconds.items()}


def communication_share(group: dist.ProcessGroup, device: torch.device, rounds: int) -> tuple[float, float]:
    """(share, spread): compute throughput lost while an all-reduce runs."""
    buffer = torch.zeros(2**20 if device.type == "cpu" else 2**26, device=device)
    comm.all_reduce(buffer, group)
    losses = _stolen(buffer, group, rounds) if device.type == "cpu" else _slowed(buffer, group, rounds)
    return statistics.median(losses), max(losses) - min(losses)


def _stolen(buffer: torch.Tensor, group: dist.ProcessGroup, rounds: int) -> list[float]:
    """On a CPU a rank has one core: what gloo's threads run of it during an all-reduce, compute cannot.

    CPU seconds of the process over the wall seconds of an undisturbed all-reduce, so that a neighbour does
    not count: it would make a race of matmuls against communication a matter of luck.
    """
    wall, used = [], []
    for _ in range(rounds):
        begin, busy = time.perf_counter(), time.process_time()
        comm.all_reduce(buffer, group)
        wall.append(time.perf_counter() - begin)
        used.append(time.process_time() - busy)
    alone = summarize(wall, QUANTILE).seconds
    return [min(seconds / alone, 1.0) for seconds in used]


def _slowed(buffer: torch.Tensor, group: dist.ProcessGroup, rounds: int) -> list[float]:
    """On a GPU: how much longer matmuls that outlast the all-reduce take beside it."""
    device = buffer.device
    stopwatch = Stopwatch(device)
    alone = summarize(
        [stopwatch.time(lambda: comm.all_reduce(buffer, group), 1) for _ in range(rounds)]
    ).seconds
    longest = torch.tensor([alone], device=device)
    comm.all_reduce(longest, group, op=dist.ReduceOp.MAX)
    compute, compute_alone = overlap_compute(device, 2 * float(longest))

    def together() -> None:
        work = comm.all_reduce(buffer, group, async_op=True)
        compute()
        work.wait()

    losses = []
    for _ in range(rounds):
        dist.barrier(group=group)
        losses.append(overlap_loss(stopwatch.time(together, 1), compute_alone, float(longest)))
    return losses
