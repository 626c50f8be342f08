"""The device seam: on a CPU streams and events are nothing, copies are copies, host tensors are marked."""

import pytest
import torch

from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker, is_host


def test_detection_follows_torch():
    platform = Platform.detect()
    assert platform.is_cuda == torch.cuda.is_available()
    assert platform.backend == ("cpu:gloo,cuda:nccl" if platform.is_cuda else "gloo")
    assert Platform(torch.device("cpu"), fake=True).backend == "fake"


def test_copies_between_tiers_keep_values():
    platform = Platform.detect()
    source = torch.arange(12.0, device=platform.device)
    host = platform.host_empty((12,), torch.float32, "boundaries")
    back = torch.empty(12, device=platform.device)
    platform.copy(host, source, "d2h")
    done = platform.record("d2h")
    platform.wait(done, "h2d")
    with platform.stream("h2d"):
        platform.copy(back, host)
    platform.wait(platform.record("h2d"))
    platform.wait_host(done)
    platform.synchronize()
    assert is_host(host)
    assert not is_host(back)
    assert torch.equal(back, source)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_allocations_are_counted_as_the_caching_allocator_does():
    platform = Platform.detect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with MemoryTracker() as tracker:
        tensors = [torch.empty(size, device=platform.device) for size in (1, 100, 1000, 12345)]
        pinned = platform.host_empty((10,), torch.float32, "optimizer")
        assert tracker.memory == torch.cuda.memory_allocated() - before
        assert tracker.host_by_category == {"optimizer": 40}
    assert pinned.is_pinned()
    del tensors
