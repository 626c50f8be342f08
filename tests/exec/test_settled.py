"""What a tracked collective held is free once it was waited for, however late gloo's thread lets go."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from mopexec.distributed import collectives
from mopexec.measure.tracker import MemoryTracker

LATE = 0.05  # seconds: a thread that is not scheduled for so long


@pytest.fixture
def late(monkeypatch):
    """Collectives whose tensors, or views of them, a thread holds for a while after they are done."""
    threads = []

    def holding(*tensors, views=False):
        held = [part for one in tensors for part in one.detach().chunk(2)] if views else list(tensors)
        held = [part.detach() for part in held]

        def hold(held):
            time.sleep(LATE)
            held.clear()

        threads.append(threading.Thread(target=hold, args=(held,)))
        threads[-1].start()

    def all_reduce(tensor, **_):
        holding(tensor)

    def all_gather(output, input, async_op, **_):
        holding(output, input, views=True)
        return collectives._Done() if async_op else None

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(collectives, "_all_gather", all_gather)
    yield
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("late")
def test_what_a_collective_held_is_freed_with_its_last_name():
    with MemoryTracker() as tracker:
        both = torch.stack((torch.zeros(()), torch.zeros(())))
        collectives.all_reduce(both)
        del both
        assert tracker.memory == 0


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("async_op", [False, True])
def test_views_elsewhere_keep_nobody_waiting(async_op):
    with MemoryTracker() as tracker:
        whole, part = torch.empty(4), torch.zeros(2)
        work = collectives.all_gather_single(whole, part, async_op=async_op)
        seen = whole.view(2, 2)  # as autograd keeps one
        work.wait()
        del whole, part, work
        assert tracker.memory == seen.nbytes
        del seen
        assert tracker.memory == 0
