"""One rank's place in the job: its process group, its core, its platform."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from mopexec.distributed.tiers import Platform

TIMEOUT = timedelta(minutes=30)


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


@contextmanager
def join() -> Iterator[RankJob]:
    """Join the process group that the launcher's variables describe; left when the block ends well.

    The store is prefixed by the restart count: a restarted group otherwise meets the keys of the one that was
    killed.
    """
    number = {
        name: int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    }
    rank, local_rank = number["RANK"], number["LOCAL_RANK"]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    platform = Platform.detect()
    cores: tuple[int, ...] = ()
    if not platform.is_cuda:
        cores = pin(local_rank, local_size)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    restart = number["TORCHELASTIC_RESTART_COUNT"]
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=TIMEOUT,
        multi_tenant=True,
    )
    dist.init_process_group(
        platform.backend,
        store=PrefixStore(f"run{restart}", store),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=platform.device if platform.is_cuda else None,
    )
    yield RankJob(rank, world_size, local_rank, local_size, restart, platform, cores)
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
