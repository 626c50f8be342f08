"""KindTimer: each op lands in its kind, with FLOP and bytes counted by hand."""

import pytest
import torch
import torch.distributed as dist

from mopexec.distributed import collectives
from mopexec.measure.scope import component, host_compute
from mopexec.measure.timers import KindTimer, op_flops
from mopexec.measure.torch_dispatch import EagerMode
from mopexec.measure.tracker import mark_host
from mopsim.spec.hardware import WORK_KINDS

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_matmuls_and_what_only_moves_data():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    timer = KindTimer()
    with timer:
        c = a @ b
        c.view(32)
        c.add_(1)
        with component("experts"):
            a @ b
            torch.bmm(a[None], b[None])
    kinds = timer.kinds()
    assert set(kinds) == {"matmul", "grouped_matmul", "memory_bound"}
    assert (kinds["matmul"].count, kinds["matmul"].flops) == (1, 2 * 8 * 16 * 4)
    assert kinds["matmul"].bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert (kinds["grouped_matmul"].count, kinds["grouped_matmul"].flops) == (2, 2 * 2 * 8 * 16 * 4)
    assert kinds["memory_bound"].count == 1
    assert all(timing.seconds > 0 for timing in kinds.values())


class Device(EagerMode):
    """A GPU's stream: every op takes the host 20 us to launch and the device 2 us to run. host, stream: where
    each is, in seconds."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.host = self.stream = 0.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def launch(self, seconds):
        self.host += 20e-6
        self.stream = max(self.stream, self.host) + seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launch(2e-6)
        return func(*args, **(kwargs or {}))


class Event:
    """An event of Device's stream."""

    def __init__(self, device):
        self.device = device

    def record(self):
        self.seconds = max(self.device.stream, self.device.host)

    def elapsed_time(self, end):
        return (end.seconds - self.seconds) * 1e3


def test_events_count_the_device_and_not_the_launch(monkeypatch):
    x, device, timer = torch.zeros(8), Device(monkeypatch), KindTimer(cuda=True)
    with device, timer:
        for _ in range(3):
            x.add_(1)
            device.host += 1e-3  # what the host does in between: the stream is idle
    assert timer.kinds()["memory_bound"].seconds == pytest.approx(3 * 2e-6)


def test_the_hosts_own_work_is_timed_by_its_clock(monkeypatch):
    monkeypatch.delattr(torch.cuda, "Event")
    timer = KindTimer(cuda=True)
    with timer, component("optimizer"), host_compute():
        torch.zeros(1000, 1000).mul_(2)
    assert timer.kinds()["host_optimizer"].seconds > 0


def test_causal_attention_counts_half_and_its_backward_five_products():
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    timer = KindTimer()
    with timer:
        out, _ = FLASH(q, k, v, 0.0, True)
    forward = 2 * 2 * (2 * 64 * 64 * 16) / 2
    assert timer.kinds()["attention"].flops == forward
    with timer:
        out.sum().backward()
    assert timer.kinds()["attention"].flops == 2.5 * forward
    timer = KindTimer()
    with timer, torch.no_grad():
        FLASH(q, k, v, 0.0, False)
    assert timer.kinds()["attention"].flops == 2 * forward


def test_attention_of_a_gpu_counts_by_what_its_op_is_told():
    """On tensors without data: [B, heads, S, d] of cuDNN's, [B, S, heads, d] of the op that knows windows."""
    rows = [torch.empty(1, 2, 64, 16, dtype=torch.bfloat16, device="meta") for _ in "qkv"]
    cudnn, whole = torch.ops.aten._scaled_dot_product_cudnn_attention.default, 2 * 2 * 2 * 64 * 64 * 16
    assert op_flops(cudnn, (*rows, None, True, 0.0, True, False), {}, None) == whole / 2
    assert op_flops(cudnn, (*rows, None, True, 0.0, False, False), {"scale": 1.0}, None) == whole
    flash = torch.ops.aten._flash_attention_forward.default
    told = (*(one.transpose(1, 2) for one in rows), None, None, 64, 64, 0.0, True, False)
    assert op_flops(flash, told, {}, None) == whole / 2
    assert op_flops(flash, told, {"window_size_left": 15, "window_size_right": 0}, None) == whole / 4
    back = (told[0], *told[:3], *told[:2], *told[3:9], *told[:2])
    assert op_flops(torch.ops.aten._flash_attention_backward.default, back, {}, None) == 5 * whole / 4


def test_copies_between_tiers_and_updates_on_either_side():
    host, device, other = mark_host(torch.ones(100), "optimizer"), torch.ones(100), torch.ones(100)
    timer = KindTimer()
    with timer:
        device.copy_(host)
        host.copy_(device)
        other.copy_(device)
        with component("optimizer"):
            torch.optim.AdamW([other.requires_grad_()], fused=True)
            _adam(device)
        with component("optimizer"), host_compute():
            _adam(host)
    kinds = timer.kinds()
    assert (kinds["h2d"].count, kinds["h2d"].bytes) == (1, 400)
    assert (kinds["d2h"].count, kinds["d2h"].bytes) == (1, 400)
    assert kinds["optimizer"].count == 1
    assert kinds["host_optimizer"].count >= 1
    assert set(kinds) <= set(WORK_KINDS)


@pytest.mark.usefixtures("world_of_one")
def test_collectives_are_timed_to_their_end_once_each():
    x, y = torch.ones(4, 2), torch.empty(4, 2)
    timer = KindTimer()
    with timer:
        collectives.all_gather_single(y, x, async_op=True).wait()
        collectives.reduce_scatter_single(y, x)
        collectives.all_to_all_single(y, x, async_op=True).wait()
        collectives.all_reduce(x)
        dist.all_reduce(x)  # not through the shim: FSDP2's own
    kinds = timer.kinds()
    assert {name: timing.count for name, timing in kinds.items() if name != "memory_bound"} == {
        "all_gather": 1,
        "reduce_scatter": 1,
        "all_to_all": 1,
        "all_reduce": 2,
    }
    assert kinds["all_gather"].bytes == 32
    collectives.all_reduce(x)  # after the timer: nothing observes
    assert timer.kinds()["all_reduce"].count == 2


def test_several_steps_give_median_low_and_high():
    x = torch.randn(64, 64)
    timer = KindTimer()
    for repeats in (1, 20, 3):
        with timer:
            for _ in range(repeats):
                x @ x
    timing = timer.kinds()["matmul"]
    assert timing.count == 3
    assert timing.seconds_low <= timing.seconds <= timing.seconds_high
    assert timing.seconds_high > timing.seconds_low


def _adam(parameter: torch.Tensor) -> None:
    moments = [torch.zeros_like(parameter) for _ in range(2)]
    torch._fused_adamw_(
        [parameter.detach()], [parameter.detach()], [moments[0]], [moments[1]], [], [torch.tensor(1.0)],
        lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
