"""One rank's place in the job: its process group, its core, its platform."""

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mopexec.distributed.tiers import Platform
from mopexec.measure.probe_machine import threads_of_rank, usable_cores
from mopexec.run import attempts
from mopexec.run.environment import CORES, RankPlace, place, threads
from mopsim.common.errors import MopError
from mopsim.common.units import format_seconds

TIMEOUT = timedelta(minutes=30)
ANSWER = timedelta(minutes=1)
"""How long what has answered once may take to be a store."""


@dataclass(frozen=True)
class RankJob:
    """rank of world_size; local_rank of local_size on this node; again: whether an earlier attempt of this
    launch had begun. cores: that no other rank works on, if any.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    again: bool
    platform: Platform
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class RankMeeting:
    """A rank that has met the others: its place, the store that they share, and `RankJob.again`."""

    place: RankPlace
    store: Store
    again: bool


def meet() -> RankMeeting:
    """Wait for the other ranks where the launcher's variables say. The wait is Python's, so that a signal
    ends it. Raises MopError where they have not come after TIMEOUT, or the place is taken.
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
    again, roster = attempts.left("begun"), _Roster(own, shared)
    _wait(roster.is_complete, end, f"{where}: not all of {own.world_size} ranks came there")
    attempts.leave("begun")
    return RankMeeting(own, PrefixStore(roster.name, shared), again)


class _Roster:
    """The ranks of this attempt, among the keys that killed ones left in the store: each signs with a word of
    its own, the first rank lists what has been signed, and a list is complete once all on it say so. The
    launcher's count of restarts would not do: nodes whose ranks did not fail do not count one.
    """

    def __init__(self, own: RankPlace, store: TCPStore) -> None:
        self._own, self._store, self._word, self.name = own, store, uuid.uuid4().hex[:12], ""
        store.set(f"rank{own.rank}", self._word)

    def is_complete(self) -> bool:
        """Asked again and again, by every rank."""
        ranks = [f"rank{rank}" for rank in range(self._own.world_size)]
        if self._own.rank == 0 and self._store.check(ranks):
            self._store.set("roster", b",".join(self._store.multi_get(ranks)).decode())
        words = self._store.get("roster").decode().split(",") if self._store.check(["roster"]) else []
        if words[self._own.rank : self._own.rank + 1] != [self._word]:
            return False
        name = hashlib.sha256(",".join(words).encode()).hexdigest()[:16]
        if name != self.name:
            self._store.add(name, 1)
        self.name = name
        return self._store.add(name, 0) >= self._own.world_size


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
    if platform.is_cuda:
        known = int(os.environ.get(CORES) or len(usable_cores()))
        torch.set_num_threads(threads_of_rank(known, own.local_size))  # torchrun's own default is 1
    else:
        cores = pin(own.local_rank, own.local_size)
        torch.set_num_threads(threads())
    begin_group(platform, meeting.store, own.rank, own.world_size)
    yield RankJob(own.rank, own.world_size, own.local_rank, own.local_size, meeting.again, platform, cores)
    dist.destroy_process_group()


def begin_group(platform: Platform, store: Store, rank: int, world_size: int) -> None:
    """The default process group, bound to the device where there is one: NCCL then connects at once."""
    dist.init_process_group(
        platform.backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=platform.device if platform.is_cuda else None,
    )


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
