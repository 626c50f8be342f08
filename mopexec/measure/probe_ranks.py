"""The probe's ranks: one process each, measuring side by side, sharing memory and caches as in training."""

import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mopexec.distributed.mesh import process_group
from mopexec.measure import probe_compute
from mopexec.measure.probe_collectives import collectives, communication_share
from mopexec.measure.probe_compute import DTYPES, AttentionProbe
from mopexec.measure.probe_fit import Shape
from mopexec.measure.probe_machine import pin_to, threads_of_rank
from mopexec.measure.probe_timing import Sample, Stopwatch
from mopexec.run.environment import cpu_rank_environment
from mopsim.common.errors import MopError
from mopsim.common.processes import end_with_parent

Progress = Callable[[str], None]
STALL_SECONDS = 180.0
"""A rank silent for longer hangs."""


@dataclass(frozen=True)
class ProbeJob:
    """ranks: processes to start. cores: one per rank on a CPU. budget: scales the seconds of each part."""

    ranks: int
    device_type: str
    cores: tuple[int, ...]
    budget: float


@dataclass
class Raw:
    """Everything that one rank timed; see the functions that fill it for the keys."""

    matmul: dict[str, dict[Shape, Sample]] = field(default_factory=dict)
    attention: AttentionProbe = field(default_factory=lambda: AttentionProbe({}, {}))
    traffic: dict[tuple[str, float], Sample] = field(default_factory=dict)
    launch: Sample = field(default_factory=lambda: Sample(0.0, 1.0, 0))
    copies: dict[tuple[str, float], Sample] = field(default_factory=dict)
    device_adam: Sample = field(default_factory=lambda: Sample(0.0, 1.0, 0))
    host_adam: Sample = field(default_factory=lambda: Sample(0.0, 1.0, 0))
    collectives: dict[int, dict[tuple[str, int], Sample]] = field(default_factory=dict)
    share: tuple[float, float] = (0.0, 0.0)


def parts(job: ProbeJob) -> list[str]:
    """Names of the parts, in order, for a progress bar."""
    matmul = [f"matmul {dtype}" for dtype in DTYPES[job.device_type]]
    ranks = [f"collectives x{size}" for size in _group_sizes(job.ranks)] + ["overlap"] * (job.ranks > 1)
    return [*matmul, "attention", "memory", "launch overhead", "host copies", "AdamW", *ranks]


def run_ranks(job: ProbeJob, progress: Progress) -> list[Raw]:
    """Start the ranks, pass on rank 0's progress, return what each measured. No process outlives the call.

    Raises MopError when a rank fails or hangs.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    with tempfile.TemporaryDirectory(prefix="mop-probe-") as folder:
        settings = cpu_rank_environment() if job.device_type == "cpu" else {}
        saved = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # a rank reads them before its first line
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, job, str(Path(folder) / "store"), messages, os.getpid()),
                daemon=True,
            )
            for rank in range(job.ranks)
        ]
        try:
            ends = {signal.SIGINT, signal.SIGTERM}
            held = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # a rank half started shows a traceback
            try:
                for process in ranks:
                    process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            return _collect(ranks, messages, progress)
        except BaseException:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
            raise
        finally:
            for name, value in saved.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
            _stop(ranks)
            messages.close()


def _collect(ranks: Sequence[BaseProcess], messages: Any, progress: Progress) -> list[Raw]:
    results: dict[int, Raw] = {}
    heard = time.monotonic()
    while len(results) < len(ranks):
        try:
            kind, rank, payload = messages.get(timeout=0.5)
        except queue.Empty:
            dead = [
                i for i, process in enumerate(ranks) if process.exitcode not in (None, 0) and i not in results
            ]
            if dead:
                raise MopError(
                    f"probe: rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}"
                ) from None
            if time.monotonic() - heard > STALL_SECONDS:
                raise MopError(f"probe: no rank reported for {STALL_SECONDS:.0f} s") from None
            continue
        heard = time.monotonic()
        if kind == "error":
            raise MopError(f"probe: rank {rank} failed: {payload}")
        if kind == "part":
            progress(payload)
        else:
            results[rank] = payload
    return [results[rank] for rank in range(len(ranks))]


def _stop(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.pid is None:
            continue
        process.join(timeout=5 if process.exitcode is None else 0)
        if process.is_alive():
            process.kill()
            process.join()


def _rank_main(rank: int, job: ProbeJob, store: str, messages: Any, parent: int) -> None:
    try:
        end_with_parent(parent)  # which may have ended while this process imported torch
        device = torch.device("cpu")
        if job.device_type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
            torch.set_num_threads(threads_of_rank(len(job.cores), job.ranks))
        else:
            torch.set_num_threads(1)
        torch.manual_seed(rank)
        backend = "nccl" if job.device_type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=torch._C._distributed_c10d.FileStore(store, job.ranks),
            rank=rank,
            world_size=job.ranks,
            timeout=timedelta(seconds=STALL_SECONDS),
            device_id=device if job.device_type == "cuda" else None,
        )
        if device.type == "cpu":  # this thread alone: communication threads go where the system puts them
            pin_to(job.cores[rank % len(job.cores)])
        try:
            messages.put(("result", rank, _measure(rank, job, device, messages)))
            dist.barrier()
        finally:
            dist.destroy_process_group()
    except KeyboardInterrupt:
        pass  # the parent was interrupted too, and says so
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        messages.put(
            ("error", rank, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
        )


def _measure(rank: int, job: ProbeJob, device: torch.device, messages: Any) -> Raw:
    """All parts in order; ranks start each together."""
    raw, stopwatch, budget = Raw(), Stopwatch(device), job.budget

    def begin(part: str) -> None:
        dist.barrier()
        if rank == 0:
            messages.put(("part", rank, part))

    for dtype in DTYPES[job.device_type]:
        begin(f"matmul {dtype}")
        raw.matmul[dtype] = probe_compute.matmuls(device, dtype, stopwatch, 1.5 * budget)
    begin("attention")
    raw.attention = probe_compute.attention(device, stopwatch, 0.8 * budget)
    begin("memory")
    raw.traffic = probe_compute.memory_traffic(device, stopwatch, 0.8 * budget)
    begin("launch overhead")
    raw.launch = probe_compute.launch_overhead(device, stopwatch, 0.4 * budget)
    begin("host copies")
    raw.copies = probe_compute.host_copies(device, stopwatch, 0.4 * budget)
    begin("AdamW")
    host, threads = torch.device("cpu"), torch.get_num_threads()
    raw.host_adam = probe_compute.adamw(host, (2**18, 2**21), 0.4 * budget, threads)
    raw.device_adam = (
        raw.host_adam if device.type == "cpu" else probe_compute.adamw(device, (2**22, 2**26), 0.4 * budget)
    )
    rounds = max(int(40 * budget), 4)
    if device.type == "cpu":
        pin_to(*job.cores)  # as in training: a rank and its communication threads share the cores of all
    for size in _group_sizes(job.ranks):
        begin(f"collectives x{size}")
        group = process_group(range(size))
        if rank < size:
            raw.collectives[size] = collectives(group, device, rounds)
    if job.ranks > 1:
        begin("overlap")
        group = process_group(range(job.ranks))
        raw.share = communication_share(group, device, max(rounds // 4, 4))
    return raw


def _group_sizes(ranks: int) -> list[int]:
    """Group sizes to time collectives at: two tell a latency per rank from a fixed one."""
    return sorted({2, ranks}) if ranks > 1 else []
