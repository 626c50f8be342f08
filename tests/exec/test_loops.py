"""What gloo's threads take of the cores."""

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from mopexec.distributed.loops import LEAST, LOOP, THREADS
from mopexec.distributed.mesh import make_group
from mopexec.distributed.tiers import Platform
from tests.exec.spawn import pool


def niceness(platform: Platform) -> list[int]:
    """Of gloo's threads in this rank, those of a group that was just made among them."""
    make_group([list(range(dist.get_world_size()))], dist.get_rank(), platform)
    names = {one: Path(THREADS, one, "comm").read_text().strip() for one in os.listdir(THREADS)}
    return [os.getpriority(os.PRIO_PROCESS, int(one)) for one, name in names.items() if name == LOOP]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_threads_that_poll_give_way_to_what_computes() -> None:
    for found in pool(2).run("tests.exec.test_loops", "niceness"):
        assert len(found) >= 2
        assert set(found) == {LEAST}
