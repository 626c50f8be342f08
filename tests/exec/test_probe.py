"""The probe's fits on made-up machines, its parts on this one, and the whole at a small budget."""

import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mopexec.measure import probe_collectives, probe_compute, probe_machine, probe_ranks
from mopexec.measure.probe import probe
from mopexec.measure.probe_fit import (
    fit_attention,
    fit_line,
    fit_matmul,
    overlap_loss,
    split_latency,
)
from mopexec.measure.probe_profile import build_profile
from mopexec.measure.probe_ranks import ProbeJob, parts, run_ranks
from mopexec.measure.probe_timing import Stopwatch, measure, summarize
from mopsim.common.errors import MopError
from mopsim.common.io import write_yaml
from mopsim.spec.hardware import COLLECTIVES
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from tests.exec.spawn import probe_ranks_forked

CPU = torch.device("cpu")


def test_fit_line_recovers_latency_and_bandwidth_beside_an_outlier() -> None:
    points = [(2.0**i, 2e-4 + 2.0**i / 1e9) for i in range(12, 24, 2)]
    points[2] = (points[2][0], points[2][1] * 5)
    fit = fit_line(points)
    assert fit.latency == pytest.approx(2e-4, rel=0.15)
    assert fit.bandwidth == pytest.approx(1e9, rel=0.15)


def test_fit_matmul_recovers_its_own_form() -> None:
    def seconds(m: int, n: int, k: int) -> float:
        return 2e-6 + 2 * (m + 5) * (n + 20) * (k + 3) / 8e10

    shapes = [(m, n, k) for m in (16, 64, 512, 4096) for n in (64, 512) for k in (64, 256)]
    fit = fit_matmul({shape: [seconds(*shape)] for shape in shapes}, 1e12, 4)
    assert fit.rate == pytest.approx(8e10, rel=0.03)
    assert (fit.m_half, fit.n_half, fit.k_half) == pytest.approx((5, 20, 3), rel=0.3)
    assert fit.error < 0.03


def test_fit_matmul_stays_on_the_memory_side_where_traffic_decides() -> None:
    times = {
        (m, 64, 64): [max(2 * m * 64 * 64 / 1e12, 4 * (2 * m * 64 + 64 * 64) / 1e9)] for m in (64, 512, 4096)
    }
    assert fit_matmul(times, 1e9, 4).error < 0.1


def test_fit_attention_recovers_both_directions() -> None:
    lengths = (64, 128, 256, 512, 1024, 2048)
    forward = {s: (1e3 * s * s, 1e3 * s * s / 5e10 * (1 + 90 / s) + 1e-5) for s in lengths}
    backward = {s: (2.5e3 * s * s, 2.5e3 * s * s / 4e10 * (1 + 90 / s) + 1e-5) for s in lengths}
    fit = fit_attention(forward, backward)
    assert fit.forward == pytest.approx(5e10, rel=0.05)
    assert fit.backward == pytest.approx(4e10, rel=0.05)
    assert fit.seq_half == pytest.approx(90, rel=0.3)


def test_latency_splits_only_where_two_sizes_were_measured() -> None:
    assert split_latency({2: 30.0, 4: 50.0}) == (10.0, 10.0, True)
    fixed, per_rank, told_apart = split_latency({2: 30.0})
    assert fixed + 2 * per_rank == 30.0
    assert not told_apart


def test_overlap_loss_lies_between_free_and_serial() -> None:
    assert overlap_loss(2.0, 2.0, 1.0) == 0.0
    assert overlap_loss(2.5, 2.0, 1.0) == 0.5
    assert overlap_loss(9.0, 2.0, 1.0) == 1.0


def test_wire_bytes_follow_the_profile() -> None:
    assert probe_collectives.wire_bytes("all_gather", 100, 4) == 75
    assert probe_collectives.wire_bytes("all_reduce", 100, 4) == 150
    assert probe_collectives.wire_bytes("send_recv", 100, 4) == 100


def test_low_quantile_ignores_a_disturbed_half() -> None:
    sample = summarize([1.0] * 5 + [10.0] * 5)
    assert sample.seconds == pytest.approx(1.0)
    assert sample.spread == pytest.approx(10.0)


def test_measure_interleaves_the_cases() -> None:
    order: list[str] = []
    samples = measure(
        {name: lambda name=name: order.append(name) or time.sleep(1e-3) for name in "ab"},
        Stopwatch(CPU, time.perf_counter),
        0.0,
    )
    assert samples["a"].repeats == samples["b"].repeats == 4
    assert order[-4:] == ["a", "b", "a", "b"]
    assert samples["a"].seconds >= 1e-3


def test_launch_overhead_is_microseconds() -> None:
    seconds = probe_compute.launch_overhead(CPU, Stopwatch(CPU), 0.05).seconds
    assert 5e-7 < seconds < 2e-4


def test_machine_facts() -> None:
    assert probe_machine.cpu_model()
    assert 1 <= len(probe_machine.usable_cores()) <= (os.cpu_count() or 1)
    assert probe_machine.machine_memory() > 2**28
    assert probe_machine.dense_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert probe_machine.dense_peak("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert probe_machine.dense_peak("NVIDIA H200 NVL", "bfloat16") == 835e12
    assert probe_machine.dense_peak("Voodoo 2", "bfloat16") is None


@pytest.mark.parametrize(
    ("capability", "cudnn", "name"),
    [((9, 0), 91501, "hopper"), ((10, 3), 92000, "blackwell"), ((9, 0), 91002, ""), ((8, 0), 92000, ""),
     ((12, 0), 92000, ""), ((9, 0), None, "")],
)  # fmt: skip
def test_cards_whose_attention_is_cudnns(
    capability: tuple[int, int], cudnn: int | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this torch has it: a plan for the profile runs what the probe has timed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    found = probe_machine.architecture(torch.device("cuda", 0))
    assert (found, probe_machine.architecture(CPU)) == (name, "")
    kernel = load_stack("mopexec-flat").on_kind("cuda").on(found).attention
    assert kernel == ("cudnn" if name else "flash2")


@pytest.mark.parametrize(("name", "kernel"), [("hopper", "CUDNN_ATTENTION"), ("", "FLASH_ATTENTION")])
def test_attention_is_timed_by_the_kernel_that_runs(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(probe_compute, "architecture", lambda device: name)
    monkeypatch.setattr(
        torch.nn.attention, "sdpa_kernel", lambda one: asked.append(one.name) or nullcontext()
    )
    forward, backward = probe_compute._cuda_flash(*torch.randn(3, 1, 2, 8, 4))
    forward()
    backward()
    assert asked == [kernel] * 2


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(MopError, match=r"^--ranks: 100000 must lie between 1 and the \d+ "):
        probe(100000, show_progress=False)


def test_a_failing_rank_is_one_line_and_leaves_no_process() -> None:
    started: list[str] = []
    others = set(probe_ranks.multiprocessing.active_children())  # the pools of other tests
    job = ProbeJob(2, "cpu", (10**6,), 0.01)  # a core that is not there
    with pytest.raises(MopError, match=r"^probe: rank \d failed: OSError") as refused:
        run_ranks(job, started.append)
    assert "\n" not in str(refused.value)
    assert set(probe_ranks.multiprocessing.active_children()) <= others


@pytest.mark.slow
def test_probe_of_this_machine_reloads_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are forked here; those of a failing probe are started."""
    probe_ranks_forked(monkeypatch)
    others = set(probe_ranks.multiprocessing.active_children())
    job = ProbeJob(2, "cpu", tuple(probe_machine.usable_cores()), 0.05)
    seen: list[str] = []
    raws = run_ranks(job, seen.append)
    assert seen == parts(job)
    assert set(probe_ranks.multiprocessing.active_children()) <= others
    profile = build_profile(raws, "cpu", 2)
    write_yaml(tmp_path / "p.yaml", profile)
    assert load_profile(tmp_path / "p.yaml") == profile
    assert profile.device_kind == "cpu"
    assert {curve.dtype for curve in profile.device.matmul} == {"float32", "bfloat16", "float64"}
    assert all(curve.peak.si > 1e8 for curve in profile.device.matmul)
    assert set(profile.scale_up.collectives) == set(COLLECTIVES)
    for kind in COLLECTIVES:
        curve = profile.scale_up.collectives[kind]
        assert 1e-6 < curve.latency.si + 2 * curve.latency_per_rank.si < 1.0
        assert curve.bandwidth.tag == "measured"
    assert 0 < profile.memory_limit() < probe_machine.machine_memory() / 2
    assert profile.memory_limit() + profile.host_limit() <= probe_machine.machine_memory() / 2
    for quantity in (profile.device.memory_bandwidth, profile.device.launch_overhead, profile.host.adam_rate):
        assert quantity.tag == "measured"
        assert quantity.source.startswith("mopexec probe on ")
    fitted = profile.device.matmul[0]
    shape = (1024, 256, 256)
    measured = statistics.median(raw.matmul[fitted.dtype][shape].seconds for raw in raws)
    assert 0.2 < 2 * 1024 * 256 * 256 / measured / (fitted.peak.si * fitted.efficiency) < 1.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_probe_of_a_gpu(tmp_path: Path) -> None:
    profile = probe(1, budget=0.3, show_progress=False)
    write_yaml(tmp_path / "p.yaml", profile)
    assert load_profile(tmp_path / "p.yaml") == profile
    assert profile.device_kind == "cuda"
    assert profile.device.memory.si == pytest.approx(
        torch.cuda.get_device_properties(0).total_memory, rel=0.1
    )
    assert profile.device.memory_bandwidth.si > 5e10
    assert profile.scale_up.collectives["all_reduce"].latency.tag == "assumed"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_probe_of_two_gpus_measures_nccl() -> None:
    profile = probe(2, budget=0.3, show_progress=False)
    assert profile.scale_up.collectives["all_reduce"].bandwidth.tag == "measured"
    assert 0 <= profile.communication_share <= 1
