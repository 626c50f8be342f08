"""The papers' largest case, 1T parameters on 96 ranks at 1M tokens, as one rank's dry run on this machine."""

import resource
import time

import pytest

from mopexec.check.dry_run import dry_run
from mopsim import strategies
from mopsim.common.errors import MopError
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec

GIB = 1024**3


def full_scale(routing: str = "balanced") -> Plan:
    strategy = strategies.mop(
        96,
        context_parallel=16,
        expert_parallel=96,
        vocab_parallel=8,
        expert_chunk_tokens=8192,
        ffn_chunk_tokens=8192,
        loss_chunk_tokens=8192,
    )
    hardware = HardwareRef(
        name="h200",
        digest="0",
        num_nodes=12,
        devices_per_node=8,
        memory_limit=141 * GIB,
        host_limit=250 * GIB,
    )
    training = TrainSpec(seq_len=1024 * 1024, global_batch=6, routing=routing)
    return Plan(
        model=load_model("mop_1t"),
        hardware=hardware,
        strategy=strategy,
        training=training,
        stack=load_stack(strategy.stack),
    )


@pytest.mark.slow
def test_one_trillion_parameters_at_a_million_tokens(capsys):
    plan = full_scale()
    begin, cpu = time.perf_counter(), time.process_time()
    result = dry_run(plan, device_limit=plan.hardware.memory_limit, host_limit=plan.hardware.host_limit)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    with capsys.disabled():
        print(f"\n1T dry run: {wall:.1f} s wall, {cpu:.1f} s CPU, {rss:.2f} GiB RSS, {result.num_ops} ops")
        print(f"peak {result.peak_memory / GIB:.2f} GiB at {result.peak_component} {result.peak_phase}")
    params, grads = result.memory_by_category["params"], result.memory_by_category["grads"]
    assert 19.5 * GIB < params < 20.5 * GIB, "2 bytes x 1.03e12 / 96 ranks"
    assert grads == pytest.approx(2 * params, rel=1e-4), "sums of gradients in fp32"
    assert 118 * GIB < result.host_by_category["optimizer"] < 121 * GIB, "12 bytes x 1.03e12 / 96 ranks"
    boundary = 65536 * 7168 * 2
    assert result.host_by_category["boundaries"] == 60 * boundary
    assert result.memory_by_category["boundaries"] <= 2 * boundary
    assert result.peak_memory < 90 * GIB


def test_an_attention_matrix_is_refused(monkeypatch):
    """A tensor of sequence x sequence anywhere in a step ends the dry run."""
    from mopexec.flat.flat_units import FlatRunner

    step = FlatRunner.step

    def with_scores(self, batches):
        length = self.plan.training.seq_len
        batches[0].tokens.new_empty(1, length, length)
        return step(self, batches)

    monkeypatch.setattr(FlatRunner, "step", with_scores)
    with pytest.raises(MopError, match="sequence x sequence"):
        dry_run(full_scale())
