"""The memory tracker on sequences counted by hand (float32 = 4 bytes)."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mopexec.distributed.tiers import Platform
from mopexec.measure.fakes import QuickFakeMode
from mopexec.measure.tracker import (
    HostRead,
    MemoryTracker,
    OutOfMemory,
    category,
    component,
    host_compute,
    mark_host,
    phase,
    recategorize,
)


@pytest.fixture(params=[nullcontext, FakeTensorMode, QuickFakeMode])
def tensors(request):
    """Run the test on tensors with data and without: the counts are to be the same."""
    with request.param():
        yield


@pytest.mark.usefixtures("tensors")
def test_allocations_count_once_in_their_category_and_leave_when_freed():
    with MemoryTracker() as tracker:
        with category("params"):
            weight = torch.empty(100, 4)
        with category("dispatch"):
            rows = weight * 2
            with category("logits"):
                strip = torch.empty(10)
        assert tracker.current_by_category == {"params": 1600, "dispatch": 1600, "logits": 40}
        del rows
        assert tracker.memory == 1640
        del strip, weight
        assert tracker.memory == 0
    assert tracker.peak_memory == 3240
    assert tracker.memory_by_category == {"params": 1600, "dispatch": 1600, "logits": 40}


@pytest.mark.usefixtures("tensors")
def test_views_and_writes_in_place_allocate_nothing():
    with MemoryTracker() as tracker:
        x = torch.zeros(8, 8)
        parts = [x.view(64), x.t(), x[2:4], x.detach(), *x.split(4), *x.unbind(0), x.reshape(4, 16)]
        x.add_(1).mul_(2)
        x[0].copy_(x[1])
        torch.add(x, x, out=x)
        assert tracker.memory == 256
        del x
        assert tracker.memory == 256, "a view keeps the storage"
        parts.clear()
        assert tracker.memory == 0


@pytest.mark.usefixtures("tensors")
def test_a_view_of_what_was_made_outside_is_not_an_allocation():
    x = torch.ones(16, 16)
    with MemoryTracker() as tracker:
        y = x.view(256)
        y.add_(1)
        assert tracker.memory == 0
        tracker.adopt(x, "params")
        tracker.adopt(y, "params")
        assert tracker.current_by_category == {"params": 1024}
        del x, y
        assert tracker.memory == 0


@pytest.mark.usefixtures("tensors")
def test_resized_storages_change_their_bytes_and_keep_their_category():
    with MemoryTracker() as tracker:
        with category("gathered"):
            full = torch.empty(100)
        storage = full.untyped_storage()
        storage.resize_(0)
        assert tracker.memory == 0
        storage.resize_(400)
        assert tracker.current_by_category == {"gathered": 400}
    storage.resize_(0)  # after the tracker: torch's own again
    assert tracker.memory == 400


@pytest.mark.usefixtures("tensors")
def test_autograd_gradients_are_seen():
    x = torch.ones(4, 8)
    weight = torch.ones(8, 8, requires_grad=True)
    with MemoryTracker() as tracker:
        with category("activations"):
            hidden = x @ weight  # 128
            loss = hidden.sum()  # 4
        with category("gathered_grads"), phase("backward"):
            loss.backward()
        assert tracker.current_by_category == {"activations": 132, "gathered_grads": 256 + 4 - 4}
        del hidden, loss
        assert tracker.memory == 256
    assert tracker.peak_phase == "backward"


@pytest.mark.usefixtures("tensors")
def test_the_peak_knows_its_component_and_phase():
    with MemoryTracker() as tracker:
        with component("attention"), phase("recompute"):
            x = torch.empty(1000)
        with component("experts"), phase("backward"):
            y = torch.empty(10)
            del x, y
            z = torch.empty(500)
    assert (tracker.peak_memory, tracker.peak_component, tracker.peak_phase) == (4040, "experts", "backward")
    tracker.reset_peak()
    assert tracker.peak_memory == 2000
    del z


@pytest.mark.usefixtures("tensors")
def test_an_allocation_over_the_limit_says_what_and_where_in_one_line():
    with MemoryTracker(device_limit=1000) as tracker:
        x = torch.empty(100)
        with (
            component("vocabulary"),
            category("logits"),
            pytest.raises(OutOfMemory) as caught,
        ):
            torch.empty(200)
        del x
    error = caught.value
    assert (error.tier, error.category, error.bytes, error.in_use, error.limit) == (
        "device",
        "logits",
        800,
        400,
        1000,
    )
    assert (error.component, error.phase) == ("vocabulary", "forward")
    message = str(error)
    assert "\n" not in message
    assert "device memory: logits wants 800 B" in message
    assert "vocabulary forward" in message
    assert tracker.memory in (0, 800)


@pytest.mark.usefixtures("tensors")
def test_the_host_has_its_own_ledger_and_limit():
    platform = Platform(torch.device("cpu"))
    with MemoryTracker(device_limit=100, host_limit=900) as tracker:
        master = platform.host_empty((200,), torch.float32, "optimizer")
        assert tracker.memory == 0
        with pytest.raises(OutOfMemory, match=r"host memory: boundaries wants 400 B .* over the limit"):
            platform.host_empty((100,), torch.float32, "boundaries")
        gc.collect()
        del master
    assert tracker.peak_memory == 0
    assert tracker.host_memory in (800, 1200)


@pytest.mark.usefixtures("tensors")
def test_host_tensors_may_be_copied_and_written_but_not_read():
    platform = Platform(torch.device("cpu"))
    with MemoryTracker() as tracker:
        state = platform.host_empty((4, 4), torch.float32, "optimizer")
        state.zero_()
        device = torch.empty(4, 4)
        device.copy_(state)
        state.view(16)[2:].copy_(device.view(16)[2:])
        with pytest.raises(HostRead, match="reads a host tensor"):
            torch.add(device, state)
        with pytest.raises(HostRead):
            torch._foreach_mul_([device, state], 2.0)
        with host_compute():
            state.mul_(2)
            made = state * 2
        assert tracker.host_by_category["optimizer"] == 64
        assert tracker.current_by_category == {"activations": 64}
        del made


def test_a_tensor_marked_before_the_tracker_is_host_when_adopted():
    state = mark_host(torch.ones(8), "optimizer")
    with MemoryTracker() as tracker:
        tracker.adopt(state, "optimizer")
        assert (tracker.memory, tracker.host_by_category) == (0, {"optimizer": 32})


def test_recategorize_moves_bytes_between_categories():
    with MemoryTracker() as tracker:
        x = torch.empty(8)
        recategorize(x.view(2, 4), "boundaries")
        assert tracker.current_by_category == {"boundaries": 32}
        del x
        assert tracker.memory == 0
    recategorize(torch.empty(2), "params")  # nothing to tell without a tracker


def test_a_tracker_entered_again_goes_on_counting():
    tracker = MemoryTracker()
    with tracker:
        x = torch.empty(8)
        assert tracker.memory == 32
    y = torch.empty(100)
    with tracker:
        z = torch.empty(4)
        assert tracker.memory == 48
    del x, y
    assert tracker.memory == 16
    del z
    assert tracker.memory == 0


def test_shape_propagation_on_meta_is_not_memory():
    with MemoryTracker() as tracker:
        x = torch.empty(1000, device="meta")
        y = x * 2
        assert tracker.memory == 0
        del x, y
