"""Gradients that the host adds, microbatch after microbatch, under FSDP2's CPU offload."""

import pytest
from msgspec.structs import replace

from mopsim.engine.simulate import run
from mopsim.graph import total_params
from mopsim.program import lower
from mopsim.spec.hardware import Correction
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.toys import machine, quantity, small

pytestmark = pytest.mark.usefixtures("tables_as_measured")


@pytest.mark.parametrize("launch", [None, 1e-6])
@pytest.mark.parametrize("microbatches", [1, 2, 7])
def test_gradients_of_later_microbatches_are_added_on_the_host(
    microbatches: int, launch: float | None
) -> None:
    """torch's `foreach_reduce`: the first gradient's copy to the host is not waited for; a later one's is,
    and the thread that issues kernels adds it to the first at a device's share of the host's DRAM."""
    strategy, work = fsdp2(8, offload=True), TrainSpec(seq_len=64, global_batch=8 * microbatches)
    issue = None if launch is None else quantity(launch, "us")
    host = replace(
        machine().host, link_d2h=quantity(100, "MB/s"), memory_bandwidth=quantity(160, "GB/s"),
        adam_rate=quantity(1000, "Gparams/s"), cpu_launch_time=issue,
    )  # fmt: skip
    profile = replace(machine(), host=host, corrections={"host_memory": Correction(scale=50)})
    workload = lower(small(), strategy, work, 8)
    found = run(workload, small(), profile, strategy, work)
    shard = 4 * total_params(small()) / 8
    copied, added = shard / 100e6, 50 * 3 * shard / (160e9 / 8)
    sums = (microbatches - 1) * added
    assert found.busy["d2h"] == pytest.approx(microbatches * copied, rel=0.01)
    assert found.busy.get("host_memory", 0.0) == pytest.approx(sums, rel=0.01)
    assert found.exposed.get("host_memory", 0.0) == pytest.approx(found.busy.get("host_memory", 0.0))
    assert found.step_time == pytest.approx(microbatches * copied + sums, rel=0.03)
    every = run(lower(small(), strategy, work, 8, expand=True), small(), profile, strategy, work)
    assert found.step_time == pytest.approx(every.step_time, rel=1e-9)
    assert found.host_memory == every.host_memory
    adds = [op for op in workload.programs[0].ops if op.stream == "host" and op.microbatch >= 0]
    assert all(op.awaited for op in adds)
    assert {op.microbatch for op in adds} == set(range(1, workload.expanded))
