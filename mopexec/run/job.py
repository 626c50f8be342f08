"""One rank's place in the job: its process group, its core, its platform."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mopexec.distributed.tiers import Platform
from mopexec.run import attempts
from mopexec.run.environment import RankPlace, place
from mopsim.common.errors import MopError
from mopsim.common.units import format_seconds

TIMEOUT = timedelta(minutes=30)
ANSWER = timedelta(minutes=1)
"""How long what has answered once may take to be a store."""


@dataclass(frozen=True)
class RankJob:
    """rank of world_size; local_rank of local_size on this node; restart: how often the launcher started us
    again. cores: that no other rank works on, if any.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    restart: int
    platform: Platform
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class RankMeeting:
    """A rank that has met the others: its place, and the store that they share."""

    place: RankPlace
    store: Store


def meet() -> RankMeeting:
    """Wait for the other ranks where the launcher's variables say. The wait is Python's, so that a signal
    ends it. Raises MopError where they have not come after TIMEOUT, or the place is taken.

    The store is prefixed by the restart count: a restarted group otherwise meets the keys of the one that was
    killed.
    """
    own, address = place(), os.environ["MASTER_ADDR"]
    is_master = own.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where, end = f"MASTER_ADDR, MASTER_PORT: {address}:{own.port}", time.monotonic() + TIMEOUT.total_seconds()
    if not is_master:
        _wait(lambda: _answers(address, own.port), end, f"{where}: nothing answers there")
    try:
        shared = TCPStore(
            address, own.port, own.world_size, is_master, ANSWER, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        raise MopError(f"{where}: {error}") from None
    shared.set_timeout(TIMEOUT)
    store = PrefixStore(f"run{own.restart}", shared)
    if store.add("met", 1) >= own.world_size:
        store.set("all", "1")
    _wait(lambda: store.check(["all"]), end, f"{where}: not all of {own.world_size} ranks came there")
    attempts.leave("begun")
    return RankMeeting(own, store)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=10).close()
    except OSError:
        return False
    return True


def _wait(done: Callable[[], bool], end: float, problem: str) -> None:
    """Return once `done`, asked less and less often. Raises MopError of `problem` at `end` (monotonic)."""
    pause = 0.01
    while not done():
        if time.monotonic() > end:
            raise MopError(f"{problem} within {format_seconds(TIMEOUT.total_seconds())}")
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)


@contextmanager
def join(meeting: RankMeeting) -> Iterator[RankJob]:
    """The process group of the ranks that have met; left when the block ends well."""
    own, platform = meeting.place, Platform.detect()
    cores: tuple[int, ...] = ()
    if not platform.is_cuda:
        cores = pin(own.local_rank, own.local_size)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(
        platform.backend,
        store=meeting.store,
        rank=own.rank,
        world_size=own.world_size,
        timeout=TIMEOUT,
        device_id=platform.device if platform.is_cuda else None,
    )
    yield RankJob(own.rank, own.world_size, own.local_rank, own.local_size, own.restart, platform, cores)
    dist.destroy_process_group()


def pin(local_rank: int, local_size: int) -> tuple[int, ...]:
    """Keep this rank on a core of its own, where there are enough, and return it; memory-bound neighbours
    disturb it less.
    """
    if not hasattr(os, "sched_setaffinity"):
        return ()
    cores = sorted(os.sched_getaffinity(0))
    if local_size > len(cores):
        return ()
    os.sched_setaffinity(0, {cores[local_rank]})
    return (cores[local_rank],)
